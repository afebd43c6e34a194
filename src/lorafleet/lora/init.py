"""How A and B start. One function a start; each fills the tensors of one slot in place."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor


def path_key(path: str) -> int:
    """A number of 63 bits that follows from a layer's path alone, whatever else is injected."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, path: str) -> torch.Generator:
    """A generator that follows from the adapter's seed and the layer's path alone."""
    return torch.Generator().manual_seed(path_key(f"{seed}:{path}"))


def kaiming(lora_A: Tensor, generator: torch.Generator) -> None:
    """A uniform in ±1/sqrt(in): Kaiming with a = sqrt(5), as nn.Linear and the LoRA reference code start."""
    bound = 1 / math.sqrt(lora_A.shape[1])
    start = torch.empty(lora_A.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    lora_A.copy_(start)


def gaussian(lora_A: Tensor, generator: torch.Generator) -> None:
    """A normal with standard deviation 1/r, as in PEFT."""
    start = torch.empty(lora_A.shape, dtype=torch.float32).normal_(0, 1 / lora_A.shape[0], generator=generator)
    lora_A.copy_(start)


STARTS: dict[str, Callable[[Tensor, torch.Generator], None]] = {"default": kaiming, "gaussian": gaussian}
"""Starts of A ``(r, in)`` by the value of ``init_lora_weights``. B always starts at zero, so ΔW does too."""
