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
        prompts: For each shared beginning its first computed token, its length, and where in the whole batch its
            repetitions start.
    """

    kept: Tensor
    place: Tensor
    prompts: tuple[tuple[int, int, tuple[int, ...]], ...]

    def to(self, device: torch.device) -> "SharedPrompts":
        """The same on another device."""
        return SharedPrompts(self.kept.to(device), self.place.to(device), self.prompts)

    def expand(self, x: Tensor) -> Tensor:
        """``(computed, ...)`` to ``(tokens, ...)``: every row gets its beginning back."""
        out: Tensor = _Expand.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def compact(self, x: Tensor) -> Tensor:
        """``(tokens, ...)`` to ``(computed, ...)``; of equal tokens the first one's values stay."""
        out: Tensor = _Compact.apply(x, self)  # type: ignore[no-untyped-call]
        return out


def share_prompts(lengths: Sequence[int], part_rows: Sequence[int], shared: Sequence[int]) -> SharedPrompts | None:
    """Lay out a batch of which the rows of each part begin with the same tokens.

    Args:
        lengths: Tokens of each row.
        part_rows: Rows of each part.
        shared: Tokens at the beginning that all rows of a part have in common; 0 for none.

    Returns:
        None where nothing is shared.
    """
    if not any(shared):
        return None
    kept, place, prompts = [], [], []
    row = start = computed = 0
    for rows, common in zip(part_rows, shared, strict=True):
        first, repetitions = computed, []
        for number, length in enumerate(lengths[row : row + rows]):
            skipped = common if number else 0
            if skipped:
                repetitions.append(start)
                place.append(torch.arange(first, first + common))
            kept.append(torch.arange(start + skipped, start + length))
            place.append(torch.arange(computed, computed + length - skipped))
            start, computed = start + length, computed + length - skipped
        if repetitions:
            prompts.append((first, common, tuple(repetitions)))
        row += rows
    return SharedPrompts(torch.cat(kept), torch.cat(place), tuple(prompts))


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
        for first, length, repetitions in ctx.shared.prompts:
            for start in repetitions:
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
