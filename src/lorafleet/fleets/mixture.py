"""One adapter on the rows of all tasks: how often each of them comes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lorafleet.config.fleet import OF_LABELS, FleetConfig, GateConfig
from lorafleet.data.store import TokenRow, TokenRows
from lorafleet.fleets.members import FleetMember
from lorafleet.fleets.plan import MemberPlan
from lorafleet.fleets.users import PLAIN
from lorafleet.models.digest import sha256_json


class MixtureRows(Sequence[TokenRow]):
    """Rows of several tasks as one sequence.

    Args:
        parts: The tasks' rows.
        picks: Task and row of each, ``(rows, 2)``.
    """

    def __init__(self, parts: Sequence[TokenRows], picks: NDArray[np.int64]) -> None:
        self.parts, self.picks = parts, picks
        self.lengths: NDArray[np.int32] = self._column("lengths")
        self.trained: NDArray[np.int32] = self._column("trained")

    def _column(self, name: str) -> Any:
        columns = [getattr(part, name) for part in self.parts]
        return np.array([columns[part][row] for part, row in self.picks], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: Any) -> Any:
        """A row, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self.picks[index]
        return self.parts[part][int(row)]

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))


def shares(sizes: Sequence[int], config: FleetConfig) -> list[int]:
    """How many rows of each task stand in one epoch; together as many as the tasks have.

    With temperature T a task of n rows has a share of n^(1/T) (Raffel et al. 2020, arXiv 1910.10683, §3.5.2): T = 1 is
    proportional, and towards equal shares as T grows.
    """
    power = {"proportional": 1.0, "equal": 0.0, "temperature": 1 / config.mixture_temperature}[config.mixture]
    weights = np.array([size**power for size in sizes])
    exact = sum(sizes) * weights / weights.sum()
    counts = np.maximum(1, np.floor(exact)).astype(int)
    for i in np.argsort(counts - exact)[: max(0, sum(sizes) - int(counts.sum()))]:
        counts[i] += 1  # largest remainders first
    return [int(count) for count in counts]


def mixture_member(members: Sequence[FleetMember], config: FleetConfig, plan: MemberPlan, folder: Path) -> FleetMember:
    """The member that trains on the rows of all others.

    Args:
        members: The tasks.
        config: How often each comes.
        plan: The shared adapter's shape and training.
        folder: Where its adapter goes.
    """
    random = np.random.default_rng(plan.training.seed)
    parts = [member.data.train for member in members]
    train = [
        (number, row)
        for number, count in enumerate(shares([len(part) for part in parts], config))
        for row in _drawn(len(parts[number]), count, random)
    ]
    held_out = [member.data.splits[member.measured_on] for member in members]
    longest = max(map(len, held_out))
    in_turn = [(number, row) for row in range(longest) for number, part in enumerate(held_out) if row < len(part)]
    splits = {"train": _rows(parts, train), "test": _rows(held_out, in_turn)}
    # The rows carry their tasks' own templates already, and no labels are common to all.
    data = replace(
        members[0].data,
        splits=splits,
        task="chat",
        labels=(),
        label_ids=(),
        data_hash=sha256_json([*(member.data.data_hash for member in members), train]),
        source_hash=sha256_json([member.data.source_hash for member in members]),
    )
    gate = plan.gate.model_copy(update={"metric": "loss", **_without_labels(plan.gate)})  # all have a loss
    return FleetMember(replace(plan, name=PLAIN, gate=gate), data, "test", folder / PLAIN)


def _without_labels(gate: GateConfig) -> dict[str, dict[str, float]]:
    limits = {"at_least": gate.at_least, "at_most": gate.at_most}
    return {
        field: {score: limit for score, limit in one.items() if score not in OF_LABELS} for field, one in limits.items()
    }


def _rows(parts: Sequence[TokenRows], picks: Sequence[tuple[int, int]]) -> TokenRows:
    return cast(TokenRows, MixtureRows(parts, np.array(picks, dtype=np.int64)))


def _drawn(size: int, count: int, random: np.random.Generator) -> list[int]:
    """``count`` of ``size`` rows: each as often as any other, but for the rest of the last round."""
    rounds = [random.permutation(size) for _ in range(-(-count // size))]
    return [int(row) for row in np.concatenate(rounds)[:count]]
