"""Attention over short sequences on a CPU, as grouped matrix products with a hand-written backward pass.

The CPU flash kernel is made for long sequences; at some 60 tokens a sequence and grouped queries its backward pass
cost several times the products themselves. Here the query heads that share a key head are stacked as rows of one
product, sequences of every length are one grouped product, and the probabilities are kept: H·T·longest numbers for T
tokens, which is why long sequences do not come here.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafleet.lora.grouped_gemm import GroupedGemms, Numbers, Operand, readable

LONGEST = 128
"""Longest sequence, in tokens, for which keeping the probabilities is cheap."""

Run = tuple[int, int, int]


class _Stack(NamedTuple):
    """The rows of queries and scores: by key head, by sequence, by query head of that key head, by token.

    Args:
        order: Which rows of ``(tokens · heads, dim)`` these are.
        back: Where each of those lies in the stack.
        mask: Additive causal mask ``(kv_heads, groups · tokens, longest)``, -inf past a sequence's end too.
        lengths: Tokens of a sequence, by run of equal lengths.
        stacked_lengths: Rows of queries of a sequence, by run.
        groups: Query heads of a key head.
        multiply: ``C_i = alpha·A_i·B_i + beta·C_i`` for each sequence and key head.
    """

    order: Tensor
    back: Tensor
    mask: Tensor
    lengths: Numbers
    stacked_lengths: Numbers
    groups: int
    multiply: GroupedGemms

    def rows(self, tensor: Tensor) -> Tensor:
        """``(1, heads, tokens, dim)`` as ``(kv_heads, groups · tokens, dim)``."""
        flat = tensor[0].transpose(0, 1).reshape(-1, tensor.shape[-1])
        return flat.index_select(0, self.order).view(*self.mask.shape[:2], -1)

    def heads(self, rows: Tensor) -> Tensor:
        """:meth:`rows` undone; in memory ``(1, tokens, heads, dim)``, as the output projection wants it."""
        tokens = self.mask.shape[1] // self.groups
        back = rows.flatten(0, 1).index_select(0, self.back)
        return back.view(1, tokens, -1, rows.shape[-1]).transpose(1, 2)

    def stacked(self, rows: Tensor) -> Operand:
        """Each sequence's part of ``(kv_heads, groups · tokens, columns)``."""
        return Operand(rows, "stacked")

    def plain(self, keys: Tensor) -> Operand:
        """Each sequence's part of ``(1, kv_heads, tokens, dim)``."""
        return Operand(keys[0], "plain")

    def sizes(self, dim: int) -> tuple[Numbers, Numbers, int]:
        """Rows of queries, rows of keys, and numbers of a head, by run."""
        return self.stacked_lengths, self.lengths, dim


@lru_cache(maxsize=2)
def _stack(runs: tuple[Run, ...], heads: int, kv_heads: int, dtype: torch.dtype) -> _Stack:
    groups = heads // kv_heads
    lengths = [length for _, count, length in runs for _ in range(count)]
    starts = [start + i * length for start, count, length in runs for i in range(count)]
    tokens = sum(lengths)
    numbers = torch.arange(tokens * heads).view(tokens, kv_heads, groups)
    parts = [numbers[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    # (length, kv_heads, groups) of each sequence as (kv_heads, groups · length).
    order = torch.cat([part.permute(1, 2, 0).flatten(1) for part in parts], dim=1).flatten()
    mask = torch.full((kv_heads, groups * tokens, max(lengths)), -torch.inf, dtype=dtype)
    for start, length in zip(starts, lengths, strict=True):
        causal = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)
        mask[:, groups * start : groups * (start + length), :length] = causal.repeat(groups, 1)
    counts, by_run = np.array([count * kv_heads for _, count, _ in runs]), np.array([length for *_, length in runs])
    first, kv = np.array(starts), np.arange(kv_heads)
    kinds = {
        "plain": lambda strides: np.add.outer(strides[1] * first, strides[0] * kv).ravel(),
        "stacked": lambda strides: np.add.outer(groups * strides[1] * first, strides[0] * kv).ravel(),
    }
    return _Stack(order, order.argsort(), mask, by_run, groups * by_run, groups, GroupedGemms(counts, kinds))


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, stack: _Stack) -> Tensor:
        queries, keys, dims = stack.sizes(query.shape[-1])
        q, scores = stack.rows(query), stack.mask.clone()
        score, k, v = stack.stacked(scores), stack.plain(key), stack.plain(value)
        stack.multiply(stack.stacked(q), k.transposed(), score, (queries, keys, dims), scale, 1)
        probabilities = scores.softmax(dim=-1)
        out = torch.empty_like(q)
        stack.multiply(stack.stacked(probabilities), v, stack.stacked(out), (queries, dims, keys))
        ctx.save_for_backward(q, key, value, probabilities)
        ctx.scale, ctx.stack = scale, stack
        return stack.heads(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        scale, stack = ctx.scale, ctx.stack
        queries, keys, dims = stack.sizes(query.shape[-1])
        grad = stack.rows(grad)
        # Past a sequence's end the probabilities are zero, and zero times whatever is there must be zero.
        grad_p = torch.zeros_like(probabilities)
        q, p, g = stack.stacked(query), stack.stacked(probabilities), stack.stacked(grad)
        k, v = stack.plain(key), stack.plain(value)
        stack.multiply(g, v.transposed(), stack.stacked(grad_p), (queries, keys, dims))
        # softmax: dS = P ∘ (dP - rowsum(dP ∘ P))
        s = stack.stacked(torch._softmax_backward_data(grad_p, probabilities, -1, query.dtype))
        grad_q = torch.empty_like(query)
        grad_k, grad_v = (t.new_empty((1, t.shape[2], *t.shape[1::2])).transpose(1, 2) for t in (key, value))
        stack.multiply(s, k, stack.stacked(grad_q), (queries, dims, keys), scale)
        stack.multiply(s.transposed(), q, stack.plain(grad_k), (keys, dims, queries), scale)
        stack.multiply(p.transposed(), g, stack.plain(grad_v), (keys, dims, queries))
        return stack.heads(grad_q), grad_k, grad_v, None, None


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
    stack = _stack(runs, query.shape[1], key.shape[1], query.dtype)
    out: Tensor = _ShortAttention.apply(query, readable(key), readable(value), scale, stack)  # type: ignore[no-untyped-call]
    return out
