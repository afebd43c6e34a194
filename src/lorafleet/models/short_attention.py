"""Attention over short sequences on a CPU, as batched matrix products with a hand-written backward pass.

The CPU flash kernel is made for long sequences; at some 60 tokens a sequence and grouped queries its backward pass
cost several times the products themselves. Here the query heads that share a key head are stacked as rows of one
product, and the probabilities are kept: H·T² numbers a sequence, which is why long sequences do not come here.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 128
"""Longest sequence, in tokens, for which keeping the probabilities is cheap."""

Run = tuple[int, int, int]


@lru_cache(maxsize=256)
def _causal(length: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask ``(groups · length, length)``, once for each query head of a key head."""
    return torch.full((length, length), -torch.inf, dtype=dtype).triu(1).repeat(groups, 1)


def _split(tensor: Tensor, run: Run, heads: int) -> Tensor:
    """A run of equal lengths of ``(1, H, tokens, dim)`` as ``(count · heads, H/heads · length, dim)``."""
    start, count, length = run
    rows = tensor[0, :, start : start + count * length].unflatten(1, (count, length))
    joined: Tensor = rows.transpose(0, 1).reshape(count * heads, -1, tensor.shape[-1])
    return joined


def _join(part: Tensor, into: Tensor, run: Run) -> None:
    """Write ``(count · heads, H/heads · length, dim)`` into a run of ``(1, H, tokens, dim)``."""
    start, count, length = run
    rows = part.view(count, into.shape[1], length, into.shape[-1]).transpose(0, 1)
    into[0, :, start : start + count * length].unflatten(1, (count, length)).copy_(rows)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, runs: tuple[Run, ...]) -> Tensor:
        heads = key.shape[1]
        groups = query.shape[1] // heads
        # In memory the output is (1, tokens, heads, dim), as the output projection wants it.
        out = query.new_empty((1, query.shape[2], *query.shape[1::2])).transpose(1, 2)
        kept = []
        for run in runs:
            q, k, v = (_split(tensor, run, heads) for tensor in (query, key, value))
            mask = _causal(run[2], groups, query.dtype).expand(len(q), -1, -1)
            probabilities = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(dim=-1)
            _join(torch.bmm(probabilities, v), out, run)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.runs = scale, runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads = key.shape[1]
        grads = [t.new_empty((1, t.shape[2], *t.shape[1::2])).transpose(1, 2) for t in (query, key, value)]
        for run, probabilities in zip(ctx.runs, kept, strict=True):
            g, q = _split(grad, run, heads), _split(query, run, heads)
            k, v = _split(key, run, heads), _split(value, run, heads)
            grad_p = torch.bmm(g, v.mT)
            # softmax: dS = P ∘ (dP - rowsum(dP ∘ P))
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, query.dtype).mul_(ctx.scale)
            for part, into in zip((grad_s @ k, grad_s.mT @ q, probabilities.mT @ g), grads, strict=True):
                _join(part, into, run)
        return *grads, None, None


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, runs: tuple[Run, ...]) -> Tensor:
    """Causal attention within each sequence of a flat batch.

    Args:
        query: ``(1, heads, tokens, dim)``.
        key: ``(1, kv_heads, tokens, dim)``; ``heads`` is a multiple of ``kv_heads``.
        value: As ``key``.
        scale: Factor of the scores.
        runs: ``(start, count, length)`` of each run of equal lengths.

    Returns:
        ``(1, heads, tokens, dim)``.
    """
    out: Tensor = _ShortAttention.apply(query, key, value, scale, runs)  # type: ignore[no-untyped-call]
    return out
