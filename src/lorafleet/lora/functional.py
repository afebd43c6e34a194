"""The LoRA product as one autograd function over a flat batch of segments.

For the rows of a segment of slot k:  y = x·Wᵀ + b + s_k · (m∘x)·A_kᵀ·B_kᵀ + c_k
with m a dropout mask already divided by 1-p, and c_k an optional trained change of the bias
(Hu et al. 2021, arXiv 2106.09685, eq. 3; several adapters in one batch as in Punica, arXiv 2310.18547).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorafleet.lora.packed import PackedWeight


class LoraSegment(NamedTuple):
    """What one layer does with rows ``start:stop``: its slot, that slot's rank, scale and dropout, and its bias."""

    slot: int
    start: int
    stop: int
    rank: int
    scaling: float
    dropout: float = 0.0
    mask_seed: int = 0
    trains_bias: bool = False


def dropout_mask(seed: int, shape: tuple[int, int], p: float, like: Tensor) -> Tensor:
    """A mask of zeros and ``1/(1-p)`` that follows from ``seed`` alone, so that the backward pass draws it again."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.empty(shape, dtype=like.dtype, device=like.device)
    return keep.bernoulli_(1 - p, generator=generator).div_(1 - p)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    segments: Sequence[LoraSegment],
) -> Tensor:
    """The same as :func:`lora_linear` in plain autograd: the definition that tests hold the fast one against."""
    y = F.linear(x, weight, bias)
    parts, end = [], 0
    for slot, start, stop, rank, scaling, p, seed, trains_bias in segments:
        parts.append(y[end:start])
        rows = x[start:stop]
        dropped = rows * dropout_mask(seed, (stop - start, x.shape[1]), p, x) if p else rows
        part = y[start:stop] + scaling * (dropped @ lora_A[slot, :rank].T.to(x.dtype)) @ lora_B[slot, :, :rank].T.to(
            x.dtype
        )
        parts.append(part + lora_bias[slot].to(x.dtype) if lora_bias is not None and trains_bias else part)
        end = stop
    return torch.cat([*parts, y[end:]])


def _even_run(segments: Sequence[LoraSegment], tokens: int) -> bool:
    """Whether the segments cover the batch in equal lengths over consecutive slots, so that one bmm serves all."""
    if len(segments) < 2:
        return False
    length = segments[0].stop - segments[0].start
    return length * len(segments) == tokens and all(
        s.start == i * length and s.stop == s.start + length and s.slot == segments[0].slot + i and not s.dropout
        for i, s in enumerate(segments)
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_bias: Tensor | None,
        segments: Sequence[LoraSegment],
        packed: PackedWeight | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias) if packed is None else packed.linear(x, bias)
        ctx.even = _even_run(segments, x.shape[0])
        ctx.segments, ctx.has_bias, ctx.packed = segments, lora_bias is not None, packed
        low = (
            _forward_even(x, y, lora_A, lora_B, segments)
            if ctx.even
            else _forward_ragged(x, y, lora_A, lora_B, segments)
        )
        if lora_bias is not None:
            for s in segments:
                if s.trains_bias:
                    y[s.start : s.stop] += lora_bias[s.slot].to(y.dtype)
        ctx.save_for_backward(x, weight, lora_A, lora_B, *low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, *low = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight if ctx.packed is None else ctx.packed.input_gradient(grad)
        grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        grad_base_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        back = _backward_even if ctx.even else _backward_ragged
        grad_A, grad_B = back(x, grad, grad_x, lora_A, lora_B, low, ctx.segments)
        grad_bias = None
        if ctx.has_bias:
            grad_bias = lora_B.new_zeros(lora_B.shape[:2])
            for s in ctx.segments:
                if s.trains_bias:
                    grad_bias[s.slot] += grad[s.start : s.stop].sum(0)
        return grad_x, grad_weight, grad_base_bias, grad_A, grad_B, grad_bias, None, None


def _forward_ragged(
    x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, segments: Sequence[LoraSegment]
) -> list[Tensor]:
    """Add each segment's update to ``y`` in place; return the rank-wide activations ``(tokens, r)``."""
    low = []
    for slot, start, stop, rank, scaling, p, seed, _ in segments:
        rows = x[start:stop]
        if p and rank:
            rows = rows * dropout_mask(seed, (stop - start, x.shape[1]), p, x)
        h = rows @ lora_A[slot, :rank].to(x.dtype).T
        y[start:stop].addmm_(h, lora_B[slot, :, :rank].to(x.dtype).T, alpha=scaling)
        low.append(h)
    return low


def _backward_ragged(
    x: Tensor,
    grad: Tensor,
    grad_x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    low: Sequence[Tensor],
    segments: Sequence[LoraSegment],
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B; the update's share of ``grad_x`` is added in place."""
    grad_A, grad_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    for (slot, start, stop, rank, scaling, p, seed, _), h in zip(segments, low, strict=True):
        if not rank:
            continue
        g, rows = grad[start:stop], x[start:stop]
        mask = dropout_mask(seed, (stop - start, x.shape[1]), p, x) if p else None
        # B transposed in memory: the rank-wide products ran up to four times slower on (out, r) than on (r, out).
        g_low = (lora_B[slot, :, :rank].to(x.dtype).T.contiguous() @ g.T).mul_(scaling)  # (r, tokens)
        grad_A[slot, :rank] += g_low @ (rows if mask is None else rows * mask)
        grad_B[slot, :, :rank] += (h.T @ g).mul_(scaling).T
        if grad_x is None:
            continue
        if mask is None:
            grad_x[start:stop].addmm_(g_low.T, lora_A[slot, :rank].to(x.dtype))
        else:
            grad_x[start:stop] += (g_low.T @ lora_A[slot, :rank].to(x.dtype)) * mask
    return grad_A, grad_B


def _slots_of(segments: Sequence[LoraSegment]) -> slice:
    return slice(segments[0].slot, segments[-1].slot + 1)


def _scales(segments: Sequence[LoraSegment], like: Tensor) -> Tensor:
    return torch.tensor([s.scaling for s in segments], dtype=like.dtype, device=like.device)[:, None, None]


def _forward_even(
    x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, segments: Sequence[LoraSegment]
) -> list[Tensor]:
    """As :func:`_forward_ragged` with one batched product; smaller ranks are zero-padded and stay zero."""
    slots = _slots_of(segments)
    h = torch.bmm(x.view(len(segments), -1, x.shape[1]), lora_A[slots].to(x.dtype).mT)
    y.view(len(segments), -1, y.shape[1]).baddbmm_(h * _scales(segments, x), lora_B[slots].to(x.dtype).mT)
    return [h]


def _backward_even(
    x: Tensor,
    grad: Tensor,
    grad_x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    low: Sequence[Tensor],
    segments: Sequence[LoraSegment],
) -> tuple[Tensor, Tensor]:
    """As :func:`_backward_ragged` with batched products."""
    slots, count, scales = _slots_of(segments), len(segments), _scales(segments, x)
    grad_A, grad_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    g, rows = grad.view(count, -1, grad.shape[1]), x.view(count, -1, x.shape[1])
    g_low = torch.bmm(lora_B[slots].to(x.dtype).mT.contiguous(), g.mT).mul_(scales)  # (K, r, tokens)
    grad_A[slots] = torch.bmm(g_low, rows).to(grad_A.dtype)
    grad_B[slots] = torch.bmm(low[0].mT, g).mul_(scales).mT.to(grad_B.dtype)
    if grad_x is not None:
        grad_x.view(count, -1, x.shape[1]).baddbmm_(g_low.mT, lora_A[slots].to(x.dtype))
    return grad_A, grad_B


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    segments: Sequence[LoraSegment],
    packed: PackedWeight | None = None,
) -> Tensor:
    """Base product and every segment's LoRA update, with a hand-written backward pass.

    Args:
        x: Input ``(tokens, in)``.
        weight: Frozen base weight ``(out, in)``.
        bias: Base bias ``(out,)``, or none.
        lora_A: All slots' A ``(K, r_max, in)``; rows past a slot's rank are zero.
        lora_B: All slots' B ``(K, out, r_max)``; columns past a slot's rank are zero.
        lora_bias: All slots' trained change of the bias ``(K, out)``, or none.
        segments: Disjoint and in order; rows that none covers get the base alone.
        packed: The frozen weight in a faster layout, if it has one.

    Returns:
        ``(tokens, out)``. Only ``x`` and the rank-wide activations are kept for the backward pass.
    """
    result: Tensor = _LoraLinear.apply(x, weight, bias, lora_A, lora_B, lora_bias, segments, packed)  # type: ignore[no-untyped-call]
    return result
