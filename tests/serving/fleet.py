"""A tiny base with a registry of adapters that answer differently."""

from pathlib import Path

import torch

from lorafleet.config import LoraConfig, ModelConfig
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import inject_lora
from lorafleet.models.load import Base, load_base
from lorafleet.registry.registry import Registry
from lorafleet.serving.pool import AdapterPool
from tests.tiny import tiny_base_folder


def write_adapter(base: Base, folder: Path, seed: int, **knobs: object) -> Path:
    """An adapter that looks trained: another one for each seed."""
    config = LoraConfig(**({"r": 2 + seed % 3, "lora_alpha": 16.0} | knobs))  # type: ignore[arg-type]
    loaded = load_base(ModelConfig(model_name_or_path=base.source, device="cpu"))
    bank = inject_lora(loaded.model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in bank.slot_parameters(0).items():
        if not name.endswith("lora_A"):
            parameter.value.add_(torch.randn(parameter.value.shape, generator=generator), alpha=0.3)
    own = {"base_weights_hash": base.weights_hash, "tokenizer_hash": base.tokenizer_hash}
    save_adapter(folder, config, bank.state_dict(0), base_name=base.name, metadata=own)
    return folder


class TinyFleet:
    """A base's folder, and a registry of adapters a0, a1, …, all at ``prod``.

    Args:
        folder: For all of it.
        count: Of adapters.
    """

    def __init__(self, folder: Path, count: int = 8) -> None:
        self.base_folder = tiny_base_folder(folder / "base")
        self.base = load_base(ModelConfig(model_name_or_path=str(self.base_folder), device="cpu"))
        self.registry = Registry(str(folder / "registry"), create=True)
        self.folder = folder
        for number in range(count):
            self.add(f"a{number}", seed=number)

    def add(self, name: str, seed: int, **knobs: object) -> str:
        """A version of a name, promoted."""
        folder = write_adapter(self.base, self.folder / "adapters" / f"{name}-{seed}", seed, **knobs)
        version = self.registry.add(folder, name)
        self.registry.promote(version.label)
        return version.label

    def pool(self, **knobs: int) -> AdapterPool:
        """A pool on a fresh copy of the base."""
        base = load_base(ModelConfig(model_name_or_path=str(self.base_folder), device="cpu", dtype="float32"))
        return AdapterPool(base, registry=self.registry.location, **knobs)
