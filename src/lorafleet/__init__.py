"""lorafleet: train, keep and use LoRA adapters, one or many on one frozen base.

The names below load what they need when they are first used: ``import lorafleet`` stays fast and imports no torch.

    lorafleet.train(model="smollm2-135m", data="rows.jsonl", output_dir="runs/first")
    lorafleet.evaluate(adapter="runs/first", data="rows.jsonl")
    lorafleet.generate(adapter="runs/first", prompt="Hello")

    bank = lorafleet.inject_lora(model, lorafleet.LoraConfig(r=8))  # inside your own loop
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.advice.run import advise
    from lorafleet.comparison.run import compare
    from lorafleet.config import LoraConfig
    from lorafleet.data.run import inspect_data
    from lorafleet.estimation.run import estimate
    from lorafleet.evaluation.run import evaluate
    from lorafleet.export.merged import merge
    from lorafleet.files.inspection import inspect
    from lorafleet.fleets.run import fleet
    from lorafleet.generation.run import generate
    from lorafleet.lora import LoraBank, LoraLinear, Routing, inject_lora
    from lorafleet.models.machine import doctor
    from lorafleet.registry.registry import Registry
    from lorafleet.search.run import tune
    from lorafleet.serving.pool import AdapterPool
    from lorafleet.training.run import train

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "LoraBank",
    "LoraConfig",
    "LoraLinear",
    "Registry",
    "Routing",
    "__version__",
    "advise",
    "compare",
    "doctor",
    "estimate",
    "evaluate",
    "fleet",
    "generate",
    "inject_lora",
    "inspect",
    "inspect_data",
    "merge",
    "train",
    "tune",
]

_HOMES = {
    "AdapterPool": "lorafleet.serving.pool",
    "LoraBank": "lorafleet.lora",
    "LoraConfig": "lorafleet.config",
    "LoraLinear": "lorafleet.lora",
    "Registry": "lorafleet.registry.registry",
    "Routing": "lorafleet.lora",
    "advise": "lorafleet.advice.run",
    "compare": "lorafleet.comparison.run",
    "doctor": "lorafleet.models.machine",
    "estimate": "lorafleet.estimation.run",
    "evaluate": "lorafleet.evaluation.run",
    "fleet": "lorafleet.fleets.run",
    "generate": "lorafleet.generation.run",
    "inject_lora": "lorafleet.lora",
    "inspect": "lorafleet.files.inspection",
    "inspect_data": "lorafleet.data.run",
    "merge": "lorafleet.export.merged",
    "train": "lorafleet.training.run",
    "tune": "lorafleet.search.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorafleet' has no attribute {name!r}")
    # Importing torch and transformers makes millions of objects that stay; collecting among them costs a tenth of it.
    collecting = gc.isenabled()
    gc.disable()
    try:
        value = getattr(import_module(_HOMES[name]), name)
    finally:
        if collecting:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
