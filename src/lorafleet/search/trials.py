"""The trials of a search as a population meets them: who enters next, who goes on from a rung, what came out."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.search.halving import survives
from lorafleet.search.objectives import DIRECTIONS
from lorafleet.search.study import Study
from lorafleet.training.member import Member, Status
from lorafleet.training.queue import Candidate
from lorafleet.training.schedule import warmup_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How long every trial trains, and where trials are compared.

    Args:
        rows: Rows that a trial sees in its full budget, in all its epochs.
        tokens_per_row: Mean tokens of a row.
        shares: Shares of the budget at which trials are compared, in order.
    """

    rows: int
    tokens_per_row: float
    shares: tuple[float, ...]

    def steps(self, training: TrainingConfig, share: float = 1.0) -> int:
        """Optimizer steps in which a trial sees a share of the rows."""
        return max(1, math.ceil(self.rows * share / _rows_per_step(training)))

    def tokens(self, share: float) -> int:
        """Tokens of a share of the budget: what a rung is known by."""
        return round(self.rows * share * self.tokens_per_row)


def _rows_per_step(training: TrainingConfig) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


@dataclass
class OpenTrial:
    """A trial that has begun and not ended.

    Args:
        number: Its number.
        lora: Its adapter's knobs.
        training: Its training knobs; ``max_steps`` is the full budget.
        to_start: Seeds of its runs that wait for a slot.
        running: Runs that have begun and not ended.
        status: training, until one of its runs is pruned or fails.
        at_rung: For each rung, by its step, the objectives of the runs that have come there, by seed.
        finals: The measurements of the runs that have ended, by seed.
        tokens: Tokens that its ended runs have seen.
        seconds: Time of the steps that its ended runs took part in.
        twins: Numbers of later trials with the same effective settings, which share its outcome.
    """

    number: int
    lora: LoraConfig
    training: TrainingConfig
    to_start: list[int]
    running: int = 0
    status: Status = "training"
    at_rung: dict[str, dict[str, float]] = field(default_factory=dict)
    finals: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    twins: list[int] = field(default_factory=list)


class Trials:
    """Candidates of a population: takes trials from a study, judges them at the rungs, and tells the study.

    Args:
        study: Where trials come from and results go.
        configure: Turns a trial's knobs into its two sections; the space has been checked, so that it cannot fail.
        budget: Of every trial.
        rows: Training rows of all trials.
        eval_rows: Their held-out rows.
        measure: The objectives of one member now, by name.
        seeds: Seeds of the runs of each setting.
        targets: Paths that an adapter with these knobs adapts, by which two settings are known to be the same.
        keep: Told of every run that has reached the full budget, while its adapter is in its slot.
        output_dir: Where it is kept.
    """

    def __init__(
        self,
        study: Study,
        configure: Callable[[Mapping[str, Any]], tuple[LoraConfig, TrainingConfig]],
        budget: Budget,
        rows: Sequence[Any],
        eval_rows: Sequence[Any],
        measure: Callable[[Member], Mapping[str, float]],
        seeds: Sequence[int],
        targets: Callable[[LoraConfig], Sequence[str]],
        keep: Callable[[int, Member, Mapping[str, float]], None],
        output_dir: Path,
    ) -> None:
        self.study, self.configure, self.budget = study, configure, budget
        self.rows, self.eval_rows, self.measure = rows, eval_rows, measure
        self.seeds, self.targets, self.keep, self.output_dir = list(seeds), targets, keep, output_dir
        self.asked: list[int] = []
        self.open: dict[int, OpenTrial] = {}
        self.effective: dict[str, int] = {}

    # -- who enters ---------------------------------------------------------------------------------------------------

    def next(self) -> Candidate | None:
        """The next run: of a trial that has begun, or of the next trial in the study."""
        while not (waiting := [trial for trial in self.open.values() if trial.to_start]):
            if not self._ask():
                return None
        trial = waiting[0]
        trial.running += 1
        return self._candidate(trial, trial.to_start.pop(0))

    def _ask(self) -> bool:
        """Open the study's next trial; one with the same effective settings as another is not run again."""
        taken = self._taken_before()
        asked = (taken, self.study.again(taken)) if taken is not None else self.study.ask()
        if asked is None:
            return False
        number, chosen = asked
        self.asked.append(number)
        settings = self.study.space.settings(chosen)
        lora, training = self.configure(settings)
        training = training.model_copy(update={"max_steps": self.budget.steps(training)})
        self.study.note(number, "settings", settings)
        key = effective_key(lora, training, self.targets(lora))
        first = self.effective.setdefault(key, number)
        if first != number:
            self._share(number, first)
        else:
            self.open[number] = OpenTrial(number, lora, training, list(self.seeds))
        return True

    def _taken_before(self) -> int | None:
        """A trial that this search had taken when it was interrupted, after its last checkpoint."""
        mine = [
            r.number for r in self.study.records if r.state != "waiting" and r.notes.get("owner") == self.study.owner
        ]
        return next((number for number in mine if number not in self.asked), None)

    def _candidate(self, trial: OpenTrial, seed: int) -> Candidate:
        steps = [self.budget.steps(trial.training, share) for share in (*self.budget.shares, 1.0)]
        training = trial.training.model_copy(update={"seed": seed})
        return Candidate(run_name(trial.number, seed), trial.lora, training, self.rows, self.eval_rows, set(steps))

    def _share(self, number: int, first: int) -> None:
        """Give a trial the outcome of an earlier one with the same effective settings, now or when that has ended."""
        self.study.note(number, "same_as", first)
        if first in self.open:
            self.open[first].twins.append(number)
            return
        record = self.study.record(first)
        if record.values is not None:
            self.study.complete(number, record.values)
        else:
            (self.study.prune if record.state == "pruned" else self.study.fail)(number)

    # -- who goes on --------------------------------------------------------------------------------------------------

    def judge(self, evaluated: Sequence[Member]) -> None:
        """Compare those at a rung with all that have come there; first all report, then each is judged."""
        at_rung = []
        for member in evaluated:
            trial, share = self.open[trial_number(member.name)], self._share_at(member)
            if share is not None and trial.status == "training":
                values = trial.at_rung.setdefault(str(share), {})
                values[str(member.config.seed)] = self.measure(member)[self.study.config.objectives[0]]
                if len(values) == len(self.seeds):
                    self.study.report(trial.number, self.budget.tokens(share), fmean(values.values()))
                    at_rung.append((trial, share))
        for trial, share in at_rung:
            if not self._goes_on(trial, share):
                trial.status = "pruned"
        for member in evaluated:
            if self.open[trial_number(member.name)].status != "training":
                member.progress.status = "pruned"

    def _share_at(self, member: Member) -> float | None:
        steps = {self.budget.steps(member.config, share): share for share in self.budget.shares}
        share = steps.get(member.progress.step)
        return share if member.progress.step < member.total_steps else None

    def _goes_on(self, trial: OpenTrial, share: float) -> bool:
        """Whether a trial survives a rung: as it was decided before an interruption, or by those who are there."""
        if not self.study.config.prunes:
            return True
        tokens, note = self.budget.tokens(share), f"goes on from {share:.4g}"
        record = self.study.record(trial.number)
        if note not in record.notes:
            arrived = [other.reported[tokens] for other in self.study.records if tokens in other.reported]
            larger = DIRECTIONS[self.study.config.objectives[0]] == "maximize"
            factor = self.study.config.reduction_factor
            kept = survives(record.reported[tokens], arrived, factor, larger_is_better=larger)
            self.study.note(trial.number, note, kept)
            return kept
        return bool(record.notes[note])

    # -- what came out ------------------------------------------------------------------------------------------------

    def ended(self, members: Sequence[Member]) -> None:
        """Take runs' results; with its last run a trial has ended."""
        for member in members:
            self._take_result(member)

    def _take_result(self, member: Member) -> None:
        trial = self.open[trial_number(member.name)]
        trial.tokens += member.progress.tokens
        trial.seconds += member.progress.seconds
        trial.running -= 1
        if member.progress.status == "finished":
            metrics = dict(self.measure(member))
            trial.finals[str(member.config.seed)] = metrics
            self.keep(trial.number, member, metrics)
        else:
            trial.status = member.progress.status
            trial.to_start.clear()
        if not trial.running and not trial.to_start:
            self._close(trial)

    def _close(self, trial: OpenTrial) -> None:
        del self.open[trial.number]
        self.study.note(trial.number, "tokens", trial.tokens)
        self.study.note(trial.number, "seconds", trial.seconds)
        numbers = [trial.number, *trial.twins]
        if trial.status != "training":
            for number in numbers:
                (self.study.prune if trial.status == "pruned" else self.study.fail)(number)
            return
        runs = list(trial.finals.values())
        means = {name: fmean(run[name] for run in runs) for name in runs[0]}
        self.study.note(trial.number, "output_dir", str(self.output_dir))
        self.study.note(trial.number, "metrics", means)
        self.study.note(trial.number, "runs", trial.finals)
        for number in numbers:
            self.study.complete(number, [means[name] for name in self.study.config.objectives])

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What has to survive an interruption beside the members' own state, in JSON's types."""
        kept = ("number", "to_start", "running", "status", "at_rung", "finals", "tokens", "seconds", "twins")
        return {
            "asked": self.asked,
            "effective": self.effective,
            "open": [{name: getattr(trial, name) for name in kept} for trial in self.open.values()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``."""
        self.asked, self.effective = list(state["asked"]), dict(state["effective"])
        for one in state["open"]:
            settings = self.study.space.settings(self.study.again(one["number"]))
            lora, training = self.configure(settings)
            training = training.model_copy(update={"max_steps": self.budget.steps(training)})
            self.open[one["number"]] = OpenTrial(lora=lora, training=training, **one)

    def candidate_of(self, name: str) -> Candidate:
        """The candidate behind a run that was training when a checkpoint was written."""
        number, seed = trial_number(name), int(name.rpartition(" seed ")[2])
        return self._candidate(self.open[number], seed)


def run_name(number: int, seed: int) -> str:
    """The name of one run of a trial in messages, logs and checkpoints."""
    return f"trial {number} seed {seed}"


def trial_number(name: str) -> int:
    """The trial that a run belongs to."""
    return int(name.split()[1])


def effective_key(lora: LoraConfig, training: TrainingConfig, targets: Sequence[str]) -> str:
    """What decides a run's result, so that two settings that mean the same have the same key.

    r = 16 with alpha = 64 is rsLoRA with r = 16 and alpha = 16; attention is q, k, v and o by name; a warm-up ratio
    is a number of steps.
    """
    one = lora.model_dump(mode="json", exclude={"target_modules", "exclude_modules", "layers_to_transform"})
    if not lora.rank_pattern and not lora.alpha_pattern:
        del one["lora_alpha"], one["use_rslora"]
        one["scaling"] = lora.scaling(lora.r, lora.lora_alpha)
    other = training.model_dump(mode="json", exclude={"warmup_ratio", "warmup_steps"})
    other["warmup"] = warmup_steps(training, training.max_steps or 1)
    return json.dumps([sorted(targets), one, other], sort_keys=True)
