"""Which rows make a step, and how rows become one flat batch. All of it follows from the seed and the step."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafleet.lora.routing import Routing
from lorafleet.models.shared_prompts import SharedPrompts, share_prompts

LEAST_SHARED = 0.05
"""Share of a part's tokens that computing its common beginning once has to save, or each row computes its own."""


class TrainRow(Protocol):
    """What a batch needs of a row: its ids and which of them are targets, both ``(tokens,)``."""

    @property
    def input_ids(self) -> Any:
        """Token ids."""

    @property
    def loss_mask(self) -> Any:
        """True where the token is to be predicted."""


@dataclass(frozen=True)
class Schedule:
    """The order of rows over a run, without state: any step can be asked for at any time.

    Args:
        rows: Number of rows.
        batch_size: Rows in a micro-batch; the last of an epoch may be smaller.
        accumulation: Micro-batches in a step; the last step of an epoch may have fewer.
        seed: Seed of the shuffles; each epoch has its own.
    """

    rows: int
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return math.ceil(math.ceil(self.rows / self.batch_size) / self.accumulation)

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of a run; ``max_steps`` replaces ``epochs``."""
        return max_steps if max_steps is not None else max(1, math.ceil(epochs * self.steps_per_epoch))

    def window(self, step: int) -> list[list[int]]:
        """Row numbers of each micro-batch of one optimizer step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        chosen = self._order(epoch)[position * size : (position + 1) * size].tolist()
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]

    def micro_batches(self, epoch: int) -> list[list[int]]:
        """Row numbers of all micro-batches of an epoch, counted from 0: its windows, one behind another."""
        order = self._order(epoch).tolist()
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows)


@dataclass(frozen=True)
class Part:
    """One adapter's share of a batch.

    Args:
        slot: Its slot, or -1 for the bare base.
        rows: Its rows.
        weight: Factor of each target's loss, one over the targets of the whole accumulation window.
        dropout_key: From which the dropout masks of this micro-batch follow.
    """

    slot: int
    rows: Sequence[TrainRow]
    weight: float = 1.0
    dropout_key: int = 0


@dataclass(frozen=True)
class FlatBatch:
    """Sequences of several adapters, one after another in one row of tokens.

    Args:
        input_ids: ``(tokens,)``.
        lengths: Tokens of each sequence.
        slots: Slot of each part.
        part_rows: Sequences of each part.
        order: Of each sequence, which of its part's rows it is.
        part_targets: Targets of each part.
        common: Of each sequence, tokens at its beginning that are not computed again: those that all rows of its part
            have in common; for the first row of a part, those in common with the sequence before it, if that has the
            same slot and dropout key. 0 where this saves little.
        positions: ``(targets,)``, the flat position whose logits predict each target.
        targets: ``(targets,)``, token ids.
        weights: ``(targets,)``, factor of each target's loss.
        dropout_keys: Of each part.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    part_rows: tuple[int, ...]
    order: tuple[int, ...]
    part_targets: tuple[int, ...]
    common: tuple[int, ...]
    positions: Tensor
    targets: Tensor
    weights: Tensor
    dropout_keys: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the batch, targets or not."""
        return int(self.input_ids.shape[0])

    @cached_property
    def position_ids(self) -> Tensor:
        """``(tokens,)``, restarting at each sequence."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def shared_prompts(self, apart: Collection[int] = ()) -> SharedPrompts | None:
        """The batch with common beginnings of rows computed once, but for the parts of the slots in ``apart``."""
        slots = np.repeat(self.slots, self.part_rows).tolist()
        return share_prompts(
            self.lengths, [0 if slot in apart else n for slot, n in zip(slots, self.common, strict=True)]
        )

    def routing(self, shared: SharedPrompts | None, *, padded: bool) -> Routing:
        """The routing of the batch, by rows when padded, by tokens when flat: by those that are computed."""
        ends = np.cumsum([0, *self.part_rows])
        if not padded:
            ends = np.cumsum([0, *self.lengths])[ends]
            if shared is not None:
                ends = np.searchsorted(shared.kept.numpy(), ends)
        slots, keys, lengths = zip(*self.by_slot(np.diff(ends).tolist()), strict=True)
        return Routing(slots, lengths, "rows" if padded else "tokens", keys)

    def by_slot(self, counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """Slot, dropout key and sum of the parts' ``counts``; neighbours of one slot and key are one segment."""
        parts = zip(self.slots, self.dropout_keys, counts, strict=True)
        return [(*run, sum(count for *_, count in group)) for run, group in groupby(parts, key=lambda one: one[:2])]

    def padded(self, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask ``(rows, longest)``, and the targets' positions in the flattened padded batch."""
        longest = max(self.lengths)
        ids = torch.full((len(self.lengths), longest), pad_id)
        mask = torch.zeros_like(ids)
        shift, start = torch.empty(self.tokens, dtype=torch.long), 0
        for row, length in enumerate(self.lengths):
            ids[row, :length] = self.input_ids[start : start + length]
            mask[row, :length] = 1
            shift[start : start + length] = row * longest - start
            start += length
        return ids, mask, self.positions + shift[self.positions]


def collate(parts: Sequence[Part]) -> FlatBatch:
    """Lay the parts one after another. Within a part, rows go by length, so that equal lengths share a product.

    A row ends before its last target: what comes from there on predicts nothing, and nothing looks back at it.
    """
    needed = [[_needed(row) for row in part.rows] for part in parts]
    orders = [sorted(range(len(rows)), key=[len(ids) for ids, *_ in rows].__getitem__) for rows in needed]
    laid = [[rows[i] for i in order] for rows, order in zip(needed, orders, strict=True)]
    positions, targets, start = list[NDArray[np.int64]](), list[NDArray[np.int64]](), 0
    for ids, where, wanted in (row for rows in laid for row in rows):
        positions.append(where + start)
        targets.append(wanted)
        start += len(ids)
    part_targets = [sum(len(where) for _, where, _ in rows) for rows in laid]
    return FlatBatch(
        input_ids=torch.from_numpy(np.concatenate([ids for rows in laid for ids, *_ in rows])),
        lengths=tuple(len(ids) for rows in laid for ids, *_ in rows),
        slots=tuple(part.slot for part in parts),
        part_rows=tuple(len(part.rows) for part in parts),
        order=tuple(i for order in orders for i in order),
        part_targets=tuple(part_targets),
        common=_common_beginnings(parts, [[ids for ids, *_ in rows] for rows in laid]),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        weights=torch.from_numpy(np.repeat([part.weight for part in parts], part_targets).astype(np.float64)),
        dropout_keys=tuple(part.dropout_key for part in parts),
    )


def _needed(row: TrainRow) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The ids that its targets depend on (one at least), where each target's prediction stands, and the targets."""
    ids, where = np.asarray(row.input_ids, dtype=np.int64), np.flatnonzero(np.asarray(row.loss_mask)[1:])
    return ids[: where[-1] + 1 if len(where) else 1], where, ids[where + 1]


def _common_beginnings(parts: Sequence[Part], laid: Sequence[Sequence[NDArray[np.int64]]]) -> tuple[int, ...]:
    """The rows' ``common`` of a batch; 0 in parts where computing beginnings once would save next to nothing."""
    found = list[int]()
    for part, rows, before, ids in zip(parts, laid, [None, *parts[:-1]], [[], *laid[:-1]], strict=True):
        joined = before is not None and (before.slot, before.dropout_key) == (part.slot, part.dropout_key)
        common = [_common_beginning([ids[-1], rows[0]]) if joined else 0]
        common += [_common_beginning(rows)] * (len(rows) - 1)
        saves = sum(common) >= LEAST_SHARED * sum(map(len, rows))
        found += common if saves else [0] * len(rows)
    return tuple(found)


def _common_beginning(rows: Sequence[NDArray[np.int64]]) -> int:
    """Tokens with which all rows begin."""
    shortest = min(map(len, rows))
    ids = np.stack([row[:shortest] for row in rows])
    differ = np.flatnonzero((ids != ids[0]).any(axis=0))
    return int(differ[0]) if len(differ) else shortest


def count_targets(rows: Sequence[TrainRow]) -> int:
    """Supervised tokens of rows; the first token of a row has nothing before it and cannot be one."""
    return sum(int(np.count_nonzero(np.asarray(row.loss_mask)[1:])) for row in rows)
