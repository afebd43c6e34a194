"""A tiny base with several adapters that answer differently, in memory and on disk."""

from pathlib import Path
from typing import Any

import torch

from lorafleet.config import LoraConfig, ModelConfig
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import LoraBank, inject_lora
from lorafleet.models.load import Base, load_base
from tests.tiny import tiny_base_folder, tiny_model, tiny_tokenizer


def tiny_base(arch: str = "llama", dtype: torch.dtype = torch.float64, *, chat: bool = True, **overrides: Any) -> Base:
    """A base that never was on disk."""
    model = tiny_model(arch, dtype, **overrides).requires_grad_(False)
    tokenizer = tiny_tokenizer(chat)
    return Base(model, tokenizer, "tiny", "tiny", None, torch.device("cpu"), dtype, "weights", "tokenizer")


def trained_bank(base: Base, ranks: tuple[int, ...] = (2, 4, 3), scale: float = 0.3, **knobs: Any) -> LoraBank:
    """A bank whose adapters look trained: nothing in them is zero."""
    bank = inject_lora(base.model, [LoraConfig(r=r, lora_alpha=4 * r, **knobs) for r in ranks])
    generator = torch.Generator().manual_seed(3)
    for slot in range(bank.num_slots):
        for name, parameter in bank.slot_parameters(slot).items():
            if not name.endswith("lora_A"):
                parameter.value.add_(torch.randn(parameter.value.shape, generator=generator), alpha=scale)
    return bank


def saved_adapter(
    tmp_path: Path,
    arch: str = "llama",
    *,
    metadata: dict[str, Any] | None = None,
    overrides: Any = None,
    scale: float = 0.01,
    **knobs: Any,
) -> tuple[Path, Path]:
    """A base folder and an adapter folder that was 'trained' on it."""
    base_folder = tiny_base_folder(tmp_path / "base", arch, **(overrides or {}))
    base = load_base(ModelConfig(model_name_or_path=str(base_folder), device="cpu"))
    bank = trained_bank(base, ranks=(4,), scale=scale, **knobs)
    config = bank.configs[0]
    assert config is not None
    own = {"base_weights_hash": base.weights_hash, "tokenizer_hash": base.tokenizer_hash}
    folder = tmp_path / "adapter"
    save_adapter(folder, config, bank.state_dict(0), base_name=base.name, metadata=own | (metadata or {}))
    return base_folder, folder
