"""Small adapters to be kept, made in milliseconds."""

from pathlib import Path

import torch

from lorafleet.config.lora import LoraConfig
from lorafleet.files.adapter import save_adapter

TOKENIZER = '{"version": "1.0"}' + " " * 5000


def adapter_folder(path: Path, seed: int = 0, *, r: int = 2, loss: float = 0.5) -> Path:
    """An adapter of one module, as a run leaves it."""
    random = torch.Generator().manual_seed(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(r, 8, generator=random),
        f"{module}.lora_B.weight": torch.randn(8, r, generator=random),
    }
    metadata = {"base_weights_hash": "b" * 64, "tokenizer_hash": "t" * 64, "metrics": {"loss": loss}}
    config = LoraConfig(r=r, target_modules=["q_proj"])
    save_adapter(path, config, tensors, base_name="tiny", metadata=metadata)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "tokenizer.json").write_text(TOKENIZER)
    (path / "loss.png").write_bytes(b"about the run")
    return path
