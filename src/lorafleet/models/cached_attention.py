"""Attention of a flat batch over keys and values that are kept: the rows of a decoding, each at a place of its own.

A batch of decoding has one new token of each row, or pieces of the prompts of those that have just come in. Keys and
values lie in memory that is there from the start, so a step writes its own and copies nothing else.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_PIECE = 128
"""Tokens whose values are summed in one product: of more, oneMKL's order depends on how many there are."""
_STEP = 16
"""Rows with one new token look at a multiple of so many tokens: those behind a row's end weigh nothing."""


class KeyValueCache:
    """Keys and values of ``rows`` sequences of up to ``capacity`` tokens, for every layer that asks.

    Attributes:
        layers: By the layer's number, keys and values, each ``(rows, kv_heads, capacity, dim)``.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, _rounded_up(capacity)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def grow(self, capacity: int) -> None:
        """Make room for longer sequences; what is there is kept, also where memory ends in the middle."""
        if capacity <= self.capacity:
            return
        capacity = _rounded_up(capacity)
        for number, both in self.layers.items():
            self.layers[number] = tuple(self._longer(tensor, capacity) for tensor in both)  # type: ignore[assignment]
        self.capacity = capacity

    def clear(self, row: int) -> None:
        """Forget a row; what is not a number in it would reach its next tokens even through a mask."""
        for both in self.layers.values():
            for tensor in both:
                tensor[row] = 0

    @staticmethod
    def _longer(tensor: Tensor, capacity: int) -> Tensor:
        if tensor.shape[2] >= capacity:  # it had grown when memory ended
            return tensor
        longer = tensor.new_zeros((*tensor.shape[:2], capacity, tensor.shape[3]))
        longer[:, :, : tensor.shape[2]] = tensor
        return longer

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made at its first call, when their shapes are known."""
        if number not in self.layers:
            keys, values = (t.new_zeros((self.rows, t.shape[1], self.capacity, t.shape[2])) for t in (key, value))
            self.layers[number] = keys, values
        return self.layers[number]


class CachedLayout:
    """A flat batch of which each sequence goes on where its row of the cache ends.

    Args:
        cache: Keys and values so far; gets those of the batch.
        rows: The row of each sequence, in the order of the batch; those with one new token come first.
        starts: How many tokens of the row come before; those that are not in the cache come before it in the batch.
        lengths: How many tokens the batch adds to it.
    """

    def __init__(
        self, cache: KeyValueCache, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.cache, self.rows, self.starts, self.lengths = cache, list(rows), list(starts), list(lengths)
        self.ones = next((i for i, length in enumerate(lengths) if length != 1), len(self.lengths))

    @property
    def positions(self) -> list[int]:
        """The position of each token of the batch in its row."""
        pairs = zip(self.starts, self.lengths, strict=True)
        return [position for start, length in pairs for position in range(start, start + length)]

    @cached_property
    def _where(self) -> tuple[Tensor, Tensor]:
        """Row and position of each token."""
        rows = [row for row, length in zip(self.rows, self.lengths, strict=True) for _ in range(length)]
        return torch.tensor(rows), torch.tensor(self.positions)

    def to(self, device: torch.device) -> "CachedLayout":
        """The same, its places on a device."""
        self.__dict__["_where"] = tuple(part.to(device) for part in self._where)
        return self

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Attention of every token over its row up to itself.

        Args:
            layer: The layer's number.
            query: ``(tokens, heads, dim)``.
            key: ``(tokens, kv_heads, dim)``.
            value: As ``key``.
            scaling: Factor of the scores; 1/sqrt(dim) when not given.
            window: Tokens that a position sees, itself included.

        Returns:
            ``(tokens, heads, dim)``.
        """
        keys, values = self.cache.layer(layer, key, value)
        rows, positions = self._where
        keys[rows, :, positions], values[rows, :, positions] = key, value
        parts = [self._one_each(query, keys, values, scaling, window)] if self.ones else []
        if self.ones == len(self.lengths):
            return parts[0]
        begin = self.ones
        for row, start, length in list(zip(self.rows, self.starts, self.lengths, strict=True))[self.ones :]:
            q = query[begin : begin + length].transpose(0, 1)[None]
            k, v = keys[row : row + 1, :, : start + length], values[row : row + 1, :, : start + length]
            parts.append(_sequence(q, k, v, self._seen(start, start + length, window), scaling))
            begin += length
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _seen(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """What each new token of a row sees, ``(stop - start, stop)``; none where that is all up to itself."""
        if not start and (window is None or window >= stop):
            return None
        known: dict[tuple[int, int, int | None], Tensor] = self.__dict__.setdefault("_views", {})
        if (start, stop, window) not in known:
            positions = torch.arange(stop, device=self._where[1].device)
            distance = positions[start:, None] - positions
            known[start, stop, window] = (distance >= 0) & (distance < (window or stop))
        return known[start, stop, window]

    def _one_each(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """The rows with one new token: a query for each head that shares a key head, all of them one after another."""
        first, stop, longest, order = self._span
        kv_heads, dim = keys.shape[1], query.shape[2]
        q = query[: self.ones]
        if order is not None:
            q = q.new_zeros((stop - first, *q.shape[1:])).index_copy_(0, order, q)
        # Of so few rows, plain products take half the time of the kernels for long ones.
        q = q.reshape((stop - first) * kv_heads, -1, dim)
        k, v = (t[first:stop, :, :longest].flatten(0, 1) for t in (keys, values))
        mask, scale = self._mask(window, q, kv_heads), dim**-0.5 if scaling is None else scaling
        scores = torch.baddbmm(mask, q, k.mT, beta=1, alpha=scale)
        weights = scores.softmax(dim=-1)
        out = torch.bmm(weights[:, :, :_PIECE], v[:, :_PIECE])
        for start in range(_PIECE, longest, _PIECE):
            out.baddbmm_(weights[:, :, start : start + _PIECE], v[:, start : start + _PIECE])
        out = out.reshape(stop - first, -1, v.shape[2])
        return out if order is None else out.index_select(0, order)

    @cached_property
    def _span(self) -> tuple[int, int, int, Tensor | None]:
        """First and last + 1 of the rows with one new token, their longest, and where each lies if not in order."""
        rows = self.rows[: self.ones]
        first, stop = min(rows), max(rows) + 1
        longest = _rounded_up(max(self.starts[: self.ones]) + 1)
        in_order = rows == list(range(first, stop))
        return first, stop, longest, None if in_order else self._where[0][: self.ones] - first

    def _mask(self, window: int | None, like: Tensor, kv_heads: int) -> Tensor:
        """0 where a row sees and -inf where not, ``(rows · kv_heads, 1, longest)``."""
        known: dict[tuple[int | None, int], Tensor] = self.__dict__.setdefault("_masks", {})
        if (window, kv_heads) not in known:
            first, stop, longest, _ = self._span
            last = torch.zeros(stop - first, dtype=torch.long)
            last[torch.tensor(self.rows[: self.ones]) - first] = torch.tensor(self.starts[: self.ones])
            distance = last[:, None] - torch.arange(longest)
            seen = (distance >= 0) & (distance < (window or longest))
            mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            known[window, kv_heads] = mask[:, None].repeat_interleave(kv_heads, dim=0).to(like.device)
        return known[window, kv_heads]


def _rounded_up(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


def _sequence(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one row's new tokens ``(1, heads, new, dim)`` over all its ``(1, kv_heads, start + new, dim)``.

    Returns:
        ``(new, heads, dim)``.
    """
    new, gqa = query.shape[2], query.shape[1] != keys.shape[1]
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None and new > 1, "scale": scaling}
    out: Tensor = scaled_dot_product_attention(query, keys, values, enable_gqa=gqa, **options)
    return out[0].transpose(0, 1)
