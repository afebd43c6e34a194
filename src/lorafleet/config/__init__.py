"""Every knob, declared once with type, unit and reason; YAML in and out. Imports no torch."""

from lorafleet.config.advice import AdviseConfig
from lorafleet.config.compare import CompareConfig, EstimateConfig, MethodsConfig
from lorafleet.config.data import DataConfig
from lorafleet.config.knob import Section, knob, other_names, switches
from lorafleet.config.load import dump_sections, known_names, load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import MethodConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import RunConfig, TrainingConfig, ValidationConfig
from lorafleet.config.use import AdapterConfig, EvaluationConfig, GenerationConfig, MergeConfig, PromptConfig

__all__ = [
    "AdapterConfig",
    "AdviseConfig",
    "CompareConfig",
    "DataConfig",
    "EstimateConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "LoraConfig",
    "MergeConfig",
    "MethodConfig",
    "MethodsConfig",
    "ModelConfig",
    "PromptConfig",
    "RunConfig",
    "SearchConfig",
    "Section",
    "TrainingConfig",
    "ValidationConfig",
    "dump_sections",
    "knob",
    "known_names",
    "load_sections",
    "other_names",
    "switches",
]
