"""How A and B start. One function a start; each fills the tensors of one slot in place."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Fresh(NamedTuple):
    """What a start fills, and what it may look at.

    Args:
        lora_A: ``(r, in)``.
        lora_B: Bᵀ ``(r, out)``, zeros.
        weight: The frozen base weight ``(out, in)``.
        scaling: Of the slot in this layer.
        generator: Follows from the adapter's seed and the layer's path alone.
    """

    lora_A: Tensor
    lora_B: Tensor
    weight: Tensor
    scaling: float
    generator: torch.Generator


def path_key(path: str) -> int:
    """A number of 63 bits that follows from a layer's path alone, whatever else is injected."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, path: str) -> torch.Generator:
    """A generator that follows from the adapter's seed and the layer's path alone."""
    return torch.Generator().manual_seed(path_key(f"{seed}:{path}"))


def kaiming(fresh: Fresh) -> None:
    """A uniform in ±1/sqrt(in): Kaiming with a = sqrt(5), as nn.Linear and the LoRA reference code start."""
    bound = 1 / math.sqrt(fresh.lora_A.shape[1])
    start = torch.empty(fresh.lora_A.shape, dtype=torch.float32)
    fresh.lora_A.copy_(start.uniform_(-bound, bound, generator=fresh.generator))


def gaussian(fresh: Fresh) -> None:
    """A normal with standard deviation 1/r, as in PEFT."""
    start = torch.empty(fresh.lora_A.shape, dtype=torch.float32)
    fresh.lora_A.copy_(start.normal_(0, 1 / len(start), generator=fresh.generator))


def lookup(fresh: Fresh) -> None:
    """For an embedding, as in PEFT: A zeros, so that rows of tokens that never come stay as they are; B normal.

    Bᵀ is what is random, and ΔW starts at zero all the same.
    """
    start = torch.empty(fresh.lora_B.shape, dtype=torch.float32)
    fresh.lora_B.copy_(start.normal_(generator=fresh.generator))


def pissa(fresh: Fresh) -> None:
    """The r largest singular values and vectors of W0: ``s·B·A`` is W0's best approximation of rank r.

    Meng et al. 2024, arXiv 2404.02948, eq. 2 and 3.
    """
    rank = len(fresh.lora_A)
    left, values, right = torch.linalg.svd(fresh.weight.to(fresh.lora_A.dtype), full_matrices=False)
    roots = (values[:rank] / fresh.scaling).sqrt()[:, None]
    fresh.lora_A.copy_(roots * right[:rank])
    fresh.lora_B.copy_(roots * left[:, :rank].T)


def olora(fresh: Fresh) -> None:
    """The first r columns and rows of the QR decomposition of W0: B is orthonormal.

    Büyükakyüz 2024, arXiv 2406.01775, algorithm 1.
    """
    rank = len(fresh.lora_A)
    q, r = torch.linalg.qr(fresh.weight.to(fresh.lora_A.dtype))
    fresh.lora_A.copy_(r[:rank])
    fresh.lora_B.copy_(q[:, :rank].T)


STARTS: dict[str, Callable[[Fresh], None]] = {
    "default": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
}
"""Starts by the value of ``init_lora_weights``.

B (of an embedding A, see :func:`lookup`) starts at zero, or a frozen copy of the start is taken off
(``LoraConfig.takes_off_start``): ΔW starts at zero.
"""
