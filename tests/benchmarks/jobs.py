"""A tiny base, rows and jobs for the peers."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

from benchmarks.job import Job
from benchmarks.rows import Row, tokenized_rows
from lorafleet.config.lora import LoraConfig
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import inject_lora
from tests.tiny import tiny_base_folder, tiny_model, tiny_tokenizer


def write_rows(path: Path, count: int) -> Path:
    """Prompts and completions of random lengths."""
    random = np.random.default_rng(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "movie",
        "great",
        "bad",
        "Paris",
        "capital",
    ]
    lines = []
    for _ in range(count):
        prompt, completion = (" ".join(random.choice(words, random.integers(2, 12))) for _ in range(2))
        lines.append(json.dumps({"prompt": prompt, "completion": completion}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@cache
def tiny_rows(count: int = 64) -> tuple[Row, ...]:
    return tuple(tokenized_rows(str(write_rows(Path(mkdtemp()) / "train.jsonl", count)), tiny_tokenizer()))


@cache
def _places() -> tuple[str, str]:
    """Folders of a tiny base and of an adapter that changes its output from the first step."""
    folder = Path(mkdtemp())
    base = tiny_base_folder(folder / "base")
    config = LoraConfig(r=4)
    bank = inject_lora(tiny_model("llama"), config, seed=3)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if "lora_B" in name else tensor
        for name, tensor in bank.state_dict(0).items()
    }
    save_adapter(folder / "adapter", config, tensors, base_name=str(base), metadata={})
    return str(base), str(folder / "adapter")


def tiny_job(**changes: Any) -> Job:
    """Five steps of four rows, at a rate that changes the loss."""
    model, adapter = _places()
    job = Job(
        phase="parity",
        model=model,
        adapter=adapter,
        rows=list(tiny_rows()[:20]),
        batch_size=4,
        steps=5,
        skipped=0,
        learning_rate=1e-2,
        warmup_steps=2,
        threads=torch.get_num_threads(),
        seed=0,
    )
    return replace(job, **changes)
