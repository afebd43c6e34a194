"""Which tokens of a batch belong to which slot."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorafleet.errors import RoutingError

BASE_ONLY = -1
"""The slot number of a segment that no adapter touches."""


class Segment(NamedTuple):
    """Consecutive tokens of one slot: rows ``start:stop`` of the flattened ``(tokens, features)`` batch."""

    slot: int
    start: int
    stop: int
    dropout_key: int | None


@dataclass(frozen=True)
class Routing:
    """Which segment of a batch goes to which slot.

    Args:
        slots: The slot of each segment; ``BASE_ONLY`` (-1) means no adapter.
        lengths: The length of each segment, in ``unit``.
        unit: ``tokens`` counts positions of the flattened batch. ``rows`` counts rows of a ``(rows, time)`` batch,
            so that one routing serves every forward of a cached generation.
        dropout_keys: One integer a segment from which its dropout masks follow; with none, they follow torch's
            global generator.

    Raises:
        RoutingError: The three sequences do not match, or a length is not positive.
    """

    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    unit: Literal["tokens", "rows"] = "tokens"
    dropout_keys: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        counts = {len(self.slots), len(self.lengths), len(self.dropout_keys or self.slots)}
        if len(counts) != 1 or not self.slots:
            raise RoutingError(f"a routing needs one slot, length and key a segment; got {self}")
        if min(self.lengths) < 1:
            raise RoutingError(f"every segment of a routing needs a length above 0; got lengths {self.lengths}")

    def segments(self, tokens: int) -> tuple[Segment, ...]:
        """Lay the segments over a flattened batch of ``tokens`` positions.

        Raises:
            RoutingError: The segments do not cover the batch exactly.
        """
        total = sum(self.lengths)
        scale = 1 if self.unit == "tokens" else tokens // total
        if total * scale != tokens:
            raise RoutingError(
                f"the routing covers {total} {self.unit}, the batch has {tokens} tokens; route every token, "
                f"those without an adapter to slot {BASE_ONLY}"
            )
        keys = self.dropout_keys or (None,) * len(self.slots)
        segments, start = [], 0
        for slot, length, key in zip(self.slots, self.lengths, keys, strict=True):
            segments.append(Segment(slot, start, start + length * scale, key))
            start += length * scale
        return tuple(segments)

    def single(self, tokens: int) -> bool:
        """Whether each of so many tokens is another row's: a step of decoding."""
        return self.unit == "rows" and tokens == sum(self.lengths)

    def of(self, tokens: Tensor) -> "Routing":
        """The routing of some tokens, one at least and ascending; without dropout, whose masks go by segments."""
        ends = torch.tensor([0, *accumulate(self.lengths)])
        counts = torch.searchsorted(tokens, ends).diff().tolist()
        kept = [(slot, count) for slot, count in zip(self.slots, counts, strict=True) if count]
        return Routing(tuple(slot for slot, _ in kept), tuple(count for _, count in kept))


_REMEMBERED = 16
"""Routings in turn whose plans are kept: requests that come and go bring a few back again and again."""


def remember(known: dict[Any, Any], key: object, value: object) -> None:
    """Note a value, and forget the oldest where there are many."""
    known.pop(key, None)
    if len(known) >= _REMEMBERED:
        del known[next(iter(known))]
    known[key] = value


class Router:
    """The routing in force, shared by a bank and its layers."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.enabled = True
        self.merged_slot: int | None = None
        self.version = 0  # counts changes of the layers and their slots, but for the numbers in A and B
        self._laid: dict[tuple[int, int], tuple[Routing | None, tuple[Segment, ...]]] = {}

    def segments(self, tokens: int) -> tuple[Segment, ...]:
        """The segments of a flattened batch of ``tokens`` positions; without a routing all go to slot 0."""
        key = (id(self.routing), tokens)
        known = self._laid.get(key)
        if known is None or known[0] is not self.routing:
            laid = self.routing.segments(tokens) if self.routing else (Segment(0, 0, tokens, None),)
            known = self.routing, laid
            remember(self._laid, key, known)
        return known[1]

    @contextmanager
    def using(self, routing: Routing | None, *, enabled: bool = True) -> Iterator[None]:
        """Put ``routing`` in force within a ``with`` block."""
        before = (self.routing, self.enabled)
        self.routing, self.enabled = routing, enabled
        try:
            yield
        finally:
            self.routing, self.enabled = before
