"""Adapters that wait for a slot, train in it, and leave it to the next."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.data.batches import TrainRow
from lorafleet.lora import LoraBank
from lorafleet.training.member import Member


@dataclass(frozen=True)
class Candidate:
    """An adapter that is to be trained: all that decides its result.

    Args:
        name: Its name in messages, logs and checkpoints.
        lora: What it looks like.
        training: How it trains; its seed decides start, order and dropout.
        rows: Its training rows.
        eval_rows: Its held-out rows; may be empty.
        eval_at: Steps after which it is evaluated.
        start: Tensors to start from, under PEFT's names; a fresh start where None.
    """

    name: str
    lora: LoraConfig
    training: TrainingConfig
    rows: Sequence[TrainRow]
    eval_rows: Sequence[TrainRow] = ()
    eval_at: Collection[int] = ()
    start: Mapping[str, Tensor] | None = None


class Candidates(Protocol):
    """Where waiting adapters come from, and who hears what became of them."""

    def next(self) -> Candidate | None:
        """The adapter that enters next; none when nothing waits."""

    def candidate_of(self, name: str) -> Candidate:
        """One that had entered when a checkpoint was written."""

    def judge(self, evaluated: Sequence[Member]) -> None:
        """Told who was just evaluated; may end a member by its ``progress.status``."""

    def ended(self, members: Sequence[Member]) -> None:
        """Told of members that have ended, while their adapters are still in their slots."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, in JSON's types."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""


class AdapterQueue:
    """Fills the slots of a bank from a queue, and fills a slot again when its adapter has ended.

    What enters a slot inherits nothing: weights, optimizer, step count and random numbers are its own.

    Args:
        bank: A bank with room reserved for every candidate (``LoraBank.reserve``).
        candidates: Where adapters come from.
        size: Slots to fill.
    """

    def __init__(self, bank: LoraBank, candidates: Candidates, size: int) -> None:
        self.bank, self.candidates, self.size = bank, candidates, size
        self.members: dict[int, Member] = {}

    def admit(self) -> list[Member]:
        """Let waiting adapters into the free slots."""
        joined = []
        for slot in range(self.size):
            if slot not in self.members:
                if (candidate := self.candidates.next()) is None:
                    break
                joined.append(self.place(candidate, slot))
        return joined

    def place(self, candidate: Candidate, slot: int) -> Member:
        """Put one adapter into one free slot."""
        self.bank.add(candidate.lora, seed=candidate.training.seed, slot=slot)
        if candidate.start is not None:
            self.bank.load_state_dict(slot, candidate.start)
        member = Member(
            candidate.name,
            self.bank,
            slot,
            candidate.training,
            candidate.rows,
            candidate.eval_rows,
            candidate.eval_at,
        )
        self.members[slot] = member
        return member

    def judge(self, evaluated: Sequence[Member]) -> None:
        """Pass an evaluation on."""
        self.candidates.judge(evaluated)

    def dismiss(self, members: Sequence[Member]) -> None:
        """Report members that have ended, and empty their slots."""
        self.candidates.ended(members)
        for member in members:
            self.bank.remove(member.slot)
            del self.members[member.slot]
