"""Tokens that the rows of a batch have in common at their beginning, computed once for all of them.

Under causal attention a token depends on those before it alone, so rows that begin alike have the same activations
there. A flat batch keeps such a beginning once; only attention, which needs every row's own keys, sees it whole.
The gradients of the repetitions add up, as they would anyway in the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """Where the tokens of a whole batch stand in one without repetitions.

    Args:
        kept: ``(computed,)``, of each token that is computed its place in the whole batch.
        place: ``(tokens,)``, of each token of the whole batch the computed one that stands for it.
        repeats: Of each repetition its first computed token, its length, and where in the whole batch it starts.
    """

    kept: Tensor
    place: Tensor
    repeats: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device) -> "SharedPrompts":
        """The same on another device."""
        return SharedPrompts(self.kept.to(device), self.place.to(device), self.repeats)

    def expand(self, x: Tensor) -> Tensor:
        """``(computed, ...)`` to ``(tokens, ...)``: every row gets its beginning back."""
        out: Tensor = _Expand.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def compact(self, x: Tensor) -> Tensor:
        """``(tokens, ...)`` to ``(computed, ...)``; of equal tokens the first one's values stay."""
        out: Tensor = _Compact.apply(x, self)  # type: ignore[no-untyped-call]
        return out


def share_prompts(lengths: Sequence[int], common: Sequence[int]) -> SharedPrompts | None:
    """Lay out a batch of rows that begin as the row before them.

    Args:
        lengths: Tokens of each row.
        common: Of each row, how many tokens it begins with that the row before it begins with too.

    Returns:
        None where nothing is shared.
    """
    if not any(common):
        return None
    kept, place, repeats = list[Tensor](), list[Tensor](), list[tuple[int, int, int]]()
    pieces: list[tuple[int, int]] = []  # the row as runs of computed tokens: first token, length
    start = computed = 0
    for length, same in zip(lengths, common, strict=True):
        pieces, at = _beginning(pieces, same), start
        for first, count in pieces:
            repeats.append((first, count, at))
            at += count
        if own := start + length - at:
            pieces.append((computed, own))
            kept.append(torch.arange(at, at + own))
        place += [torch.arange(first, first + count) for first, count in pieces]
        start, computed = start + length, computed + own
    return SharedPrompts(torch.cat(kept), torch.cat(place), tuple(repeats))


def _beginning(pieces: Sequence[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The first ``tokens`` tokens of a row's pieces."""
    found = []
    for first, count in pieces:
        if tokens > 0:
            found.append((first, min(count, tokens)))
        tokens -= count
    return found


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Whole slices: autograd's own index_add would go token by token.
        out = grad.index_select(0, ctx.shared.kept)
        for first, length, start in ctx.shared.repeats:
            out[first : first + length] += grad[start : start + length]
        return out, None


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared, ctx.tokens = shared, len(x)
        return x.index_select(0, shared.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros((ctx.tokens, *grad.shape[1:]))
        out[ctx.shared.kept] = grad
        return out, None
