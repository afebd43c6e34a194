"""The adapters of a fleet as candidates of one population: who waits, who trains, what became of each."""

import logging
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorafleet.data.load import Data, load_data
from lorafleet.data.store import TokenRow, sample
from lorafleet.errors import ConfigError, DataError
from lorafleet.files.adapter import load_adapter
from lorafleet.fleets.plan import MemberPlan
from lorafleet.fleets.users import folder_name
from lorafleet.lora import LoraBank
from lorafleet.methods.method import Method
from lorafleet.models.load import Base
from lorafleet.training.events import Event, Failed
from lorafleet.training.member import Member
from lorafleet.training.queue import Candidate
from lorafleet.training.result import write_trained

logger = logging.getLogger(__name__)

WRITERS = 2
"""Adapters that are written at a time."""


@dataclass(frozen=True)
class FleetMember:
    """A member whose rows can be trained.

    Args:
        plan: What was asked for.
        data: Its rows.
        measured_on: The split of its rows that it is measured on.
        folder: Where its adapter goes.
    """

    plan: MemberPlan
    data: Data
    measured_on: str
    folder: Path

    def held_out(self, most: int) -> list[TokenRow]:
        """The rows it is measured on."""
        return sample(self.data.splits[self.measured_on], most)


def load_members(
    plans: Sequence[MemberPlan], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[list[FleetMember], dict[str, str]]:
    """Read every member's rows.

    Returns:
        The members whose rows can be trained and measured, and for the others the reason.
    """
    members, faults = list[FleetMember](), dict[str, str]()
    alike = Counter(plan.name.lower() for plan in plans)
    for plan in plans:
        try:
            data = load_data(plan.data, tokenizer)
            if not len(data.train):
                raise DataError("no row to train on")
            split = next((name for name in ("test", "valid") if len(data.splits.get(name, ()))), None)
            if split is None:
                raise DataError("no row to measure on; give a test file, or a valid_fraction above 0")
            own = plan.name if alike[plan.name.lower()] == 1 else folder_name(plan.name)
            members.append(FleetMember(plan, data, split, folder / own))
        except (DataError, ConfigError) as error:
            faults[plan.name] = str(error)
            logger.warning("%s is left out: %s", plan.name, error)
    return members, faults


class FleetCandidates:
    """Lets members into the population in their order; the one that others start from goes first.

    Args:
        members: All members.
        base: The base.
        bank: Its slots.
        first: The member whose adapter others start from; None where all start afresh.
        warm: Those others.
    """

    def __init__(
        self,
        members: Sequence[FleetMember],
        base: Base,
        bank: LoraBank,
        first: str | None,
        warm: Collection[str],
    ) -> None:
        self.members = {member.plan.name: member for member in members}
        self.base, self.bank, self.first, self.warm = base, bank, first, warm
        self.waiting = [name for name in self.members if name != first]
        self.outcomes: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        if first is not None:
            self.waiting.insert(0, first)

    def next(self) -> Candidate | None:
        """The next member, once what it starts from is there."""
        if not self.waiting:
            return None
        name = self.waiting[0]
        if name in self.warm and self.first not in self.outcomes:
            return None
        self.waiting.pop(0)
        return self.candidate_of(name)

    def candidate_of(self, name: str) -> Candidate:
        """A member as it enters a slot."""
        plan = self.members[name].plan
        return Candidate(name, plan.lora, plan.training, self.members[name].data.train, start=self._start(name))

    def judge(self, evaluated: Sequence[Member]) -> None:
        """Nobody is judged while it trains."""

    def ended(self, members: Sequence[Member]) -> None:
        """Keep the adapters of members that have ended; of those that failed, that they did."""
        for member in members:
            self.outcomes[member.name] = member.progress.status
            self.steps[member.name], self.tokens[member.name] = member.progress.step, member.progress.tokens
        finished = [member for member in members if member.progress.status == "finished"]
        with ThreadPoolExecutor(WRITERS) as pool:  # hashing and the disk leave the interpreter to others
            list(pool.map(self._write, finished))

    def _write(self, member: Member) -> None:
        one = self.members[member.name]
        config = self.bank.configs[member.slot]
        assert config is not None
        method = Method("lora", "lora", config, member.config)
        # Of an earlier end, after which the run went back: its files may be the registry's too.
        shutil.rmtree(one.folder, ignore_errors=True)
        write_trained(one.folder, self.base, member, method, one.data, one.plan.data, {})

    def note(self, event: Event) -> None:
        """Keep why a member failed."""
        if isinstance(event, Failed):
            self.failures[event.name] = f"{event.reason} in step {event.step}; rows {', '.join(event.rows)}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        kept = ("waiting", "outcomes", "steps", "tokens", "failures")
        return {name: getattr(self, name) for name in kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.waiting, self.outcomes = list(state["waiting"]), dict(state["outcomes"])
        self.steps, self.tokens = dict(state["steps"]), dict(state["tokens"])
        self.failures = dict(state["failures"])

    def _start(self, name: str) -> dict[str, Tensor] | None:
        if self.first is None or name not in self.warm or self.outcomes.get(self.first) != "finished":
            return None
        return load_adapter(self.members[self.first].folder).tensors
