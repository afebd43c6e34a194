"""Every knob, declared once with type, unit and reason; YAML in and out. Imports no torch."""

from lorafleet.config.advice import AdviseConfig
from lorafleet.config.combine import CombineConfig
from lorafleet.config.compare import CompareConfig, EstimateConfig, MethodsConfig
from lorafleet.config.data import DataConfig
from lorafleet.config.fleet import FLEET_DEFAULTS, FleetConfig, GateConfig, UsersConfig
from lorafleet.config.knob import Section, knob, other_names, switches
from lorafleet.config.load import dump_sections, known_names, load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import MethodConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import (
    AddConfig,
    AliasConfig,
    ExportConfig,
    GcConfig,
    ImportConfig,
    ListConfig,
    PromoteConfig,
    RegistryConfig,
)
from lorafleet.config.search import SearchConfig
from lorafleet.config.serving import ChatConfig, PoolConfig
from lorafleet.config.training import PopulationConfig, RunConfig, TrainingConfig, ValidationConfig
from lorafleet.config.use import (
    AdapterConfig,
    ConvertConfig,
    EvaluationConfig,
    GenerationConfig,
    MergeConfig,
    PromptConfig,
)

__all__ = [
    "FLEET_DEFAULTS",
    "AdapterConfig",
    "AddConfig",
    "AdviseConfig",
    "AliasConfig",
    "ChatConfig",
    "CombineConfig",
    "CompareConfig",
    "ConvertConfig",
    "DataConfig",
    "EstimateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FleetConfig",
    "GateConfig",
    "GcConfig",
    "GenerationConfig",
    "ImportConfig",
    "ListConfig",
    "LoraConfig",
    "MergeConfig",
    "MethodConfig",
    "MethodsConfig",
    "ModelConfig",
    "PoolConfig",
    "PopulationConfig",
    "PromoteConfig",
    "PromptConfig",
    "RegistryConfig",
    "RunConfig",
    "SearchConfig",
    "Section",
    "TrainingConfig",
    "UsersConfig",
    "ValidationConfig",
    "dump_sections",
    "knob",
    "known_names",
    "load_sections",
    "other_names",
    "switches",
]
