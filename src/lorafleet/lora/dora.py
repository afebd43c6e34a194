"""DoRA: a learned length for each row of the weight, whose direction LoRA changes.

For the rows of a segment of slot k:  y = c_k ∘ (x·W0ᵀ + s_k·x·A_kᵀ·B_kᵀ) + b,  c_k = m_k / ‖W0 + s_k·B_k·A_k‖
with the norm of each row, ``(out,)``, a constant in the backward pass (Liu et al. 2024, arXiv 2402.09353, eq. 5 and
section 4.3). PEFT drops inputs of both products under dropout; here W0's product keeps its input, as in plain LoRA.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorafleet.lora.segments import LoraSegment


def row_norms(
    weight_squares: Tensor, weight_product: Callable[[Tensor], Tensor], lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """``‖W0 + s·B·A‖`` of each row, ``(out,)``, without the sum itself.

    ``‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ`` for a row w of W0 and b of B.

    Args:
        weight_squares: ``‖W0‖²`` of each row, ``(out,)``.
        weight_product: ``x ↦ x·W0ᵀ``.
        lora_A: ``(r, in)``.
        lora_B: Bᵀ ``(r, out)``.
        scaling: s.
    """
    cross = weight_product(lora_A.to(weight_squares.dtype)).to(lora_B.dtype)
    own = (lora_A @ lora_A.T) @ lora_B
    squares = weight_squares + 2 * scaling * (cross * lora_B).sum(0) + scaling**2 * (own * lora_B).sum(0)
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def rescale(
    y: Tensor, segments: Sequence[LoraSegment], factors: dict[int, Tensor], biases: dict[int, Tensor | None]
) -> Tensor:
    """``c ∘ (y - b) + b`` for the rows of the slots that have factors; the others as they are.

    Args:
        y: A layer's output ``(tokens, out)`` with its bias.
        segments: Disjoint and in order.
        factors: c of a slot, ``(out,)``.
        biases: b of a slot, ``(out,)``, or none.
    """
    parts, end = [], 0
    for s in segments:
        if s.slot in factors:
            part, bias = y[s.start : s.stop], biases[s.slot]
            # A factor of 1, as a fresh adapter has it, leaves the output as it is, bit for bit.
            plain = part if bias is None else part - bias.to(y.dtype)
            parts += [y[end : s.start], part + (factors[s.slot].to(y.dtype) - 1) * plain]
            end = s.stop
    return torch.cat([*parts, y[end:]])
