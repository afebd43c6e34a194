"""Training of a whole fleet as one population."""

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lorafleet.errors import TrainingError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.fleets.members import FleetCandidates
from lorafleet.fleets.plan import FleetPlan
from lorafleet.training.capacity import adapters_of_a_pass, measured_capacity
from lorafleet.training.checkpoint import RunState
from lorafleet.training.events import Event, Failed, Finished, Saved, StepDone
from lorafleet.training.queued import train_queued
from lorafleet.training.report import clock
from lorafleet.training.setup import run_identity

logger = logging.getLogger(__name__)


def train_members(
    plan: FleetPlan, loss_model: LossModel, candidates: FleetCandidates, checkpoint: Path | None
) -> Mapping[str, Any]:
    """Train every candidate, some at a time, and write each one's adapter when it ends.

    Args:
        plan: The fleet.
        loss_model: The base with slots, all empty.
        candidates: Who trains; why some failed is in its ``failures`` then.
        checkpoint: To go on from.

    Returns:
        What the last checkpoint holds besides, see :func:`train_queued`.

    Raises:
        CheckpointError: The checkpoint belongs to another fleet.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
        TrainingError: Every member failed.
    """
    state = RunState(Path(plan.run.output_dir), identity(plan, candidates), plan.run.save_total_limit)
    logger.info("%d adapters", len(candidates.members))
    train_queued(
        candidates,
        [one.plan.lora for one in candidates.members.values()],
        candidates.bank,
        loss_model,
        plan.run,
        state,
        checkpoint,
        room=lambda: _capacity(plan, loss_model, candidates),
        display=lambda: FleetDisplay(candidates, plan.run.logging_steps),
        observers=[candidates.note],
    )
    if len(candidates.failures) == len(candidates.members):
        raise TrainingError(f"every adapter failed; the first: {next(iter(candidates.failures.values()))}")
    return state.extra


def identity(plan: FleetPlan, candidates: FleetCandidates) -> dict[str, Any]:
    """What decides the adapters: a resumed fleet must agree in all of it."""
    return {
        name: run_identity(
            candidates.base,
            one.data,
            one.plan.data,
            "lora",
            one.plan.lora.model_dump(mode="json"),
            one.plan.training,
            plan.run,
        )
        for name, one in candidates.members.items()
    } | {"start from": candidates.first}


def _capacity(plan: FleetPlan, loss_model: LossModel, candidates: FleetCandidates) -> tuple[int, int | None]:
    """How many train together, where nobody says by memory and speed; and how many of them share a pass."""
    members = candidates.members.values()
    sizes = [min(one.plan.training.per_device_train_batch_size, len(one.data.train)) for one in members]
    tokens = fmean(size * one.data.train.lengths.mean() for size, one in zip(sizes, members, strict=True))
    if plan.population.population_size is not None:
        return min(plan.population.population_size, len(members)), adapters_of_a_pass(tokens, loss_model.device)
    size = max(sizes)
    longest = max(members, key=lambda one: int(np.sort(one.data.train.lengths)[-size:].sum())).data.train
    rows = [longest[int(i)] for i in longest.lengths.argsort()[-size:]]
    shapes, share = [one.plan.lora for one in members], plan.population.max_memory
    fitting, together = measured_capacity(loss_model, candidates.bank, shapes, rows, share, 1, tokens)
    side_by_side = max(1, len(members) - (candidates.first is not None))  # the first one trains alone
    rounds = math.ceil(side_by_side / fitting)
    return math.ceil(side_by_side / rounds), together


class FleetDisplay:
    """Progress for people: a bar over all steps of all adapters on a terminal, lines in any case.

    Args:
        candidates: Who trains.
        logging_steps: Steps of the population between lines.
    """

    def __init__(self, candidates: FleetCandidates, logging_steps: int) -> None:
        self.candidates, self.every = candidates, logging_steps
        self._training: dict[str, StepDone] = {}
        self._rounds, self._tokens, self._seconds = 0, 0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None
        self._task: TaskID | None = None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("adapters", total=len(candidates.members))

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Saved):
            logger.info("saved %s", event.path)
        elif isinstance(event, Finished | Failed):
            last = self._training.pop(event.name, None)
            loss = f", loss {last.loss:.4f}" if last else ""
            what = f"failed: {event.reason}" if isinstance(event, Failed) else f"is trained{loss}"
            logger.log(logging.WARNING if isinstance(event, Failed) else logging.INFO, "%s %s", event.name, what)
            if self._bar is not None and self._task is not None:
                self._bar.advance(self._task)

    def _step(self, event: StepDone) -> None:
        self._training[event.name] = event
        self._tokens += event.tokens
        if event.name == next(iter(self._training)):  # one of those training counts the rounds
            self._rounds += 1
            self._seconds += event.seconds
            if self._rounds % self.every == 0:
                done = len(self.candidates.outcomes)
                logger.info(
                    "%d of %d adapters done, %d train; %.0f tokens/s in %s",
                    *(done, len(self.candidates.members), len(self._training)),
                    *(self._tokens / self._seconds, clock(self._seconds)),
                )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
