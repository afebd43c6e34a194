"""Training of a whole fleet as one population that fills the memory budget."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lorafleet.errors import TrainingError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.fleets.members import FleetCandidates
from lorafleet.fleets.plan import FleetPlan
from lorafleet.training.capacity import measured_capacity
from lorafleet.training.checkpoint import RunState
from lorafleet.training.events import Event, Failed, Finished, Saved, StepDone
from lorafleet.training.interrupt import listen
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from lorafleet.training.queue import AdapterQueue
from lorafleet.training.report import clock, reporting
from lorafleet.training.setup import run_identity

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What came of a training: why members failed, by name, and how many trained together."""

    failures: dict[str, str]
    population_size: int


def train_members(
    plan: FleetPlan, loss_model: LossModel, candidates: FleetCandidates, checkpoint: Path | None
) -> Trained:
    """Train every candidate, as many together as have room, and write each one's adapter when it ends.

    Args:
        plan: The fleet.
        loss_model: The base with slots, all empty.
        candidates: Who trains.
        checkpoint: To go on from.

    Returns:
        Why members failed, and how many trained together.

    Raises:
        CheckpointError: The checkpoint belongs to another fleet.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
        TrainingError: Every member failed.
    """
    folder = Path(plan.run.output_dir)
    bank = candidates.bank
    state = RunState(folder, identity(plan, candidates), plan.run.save_total_limit)
    bank.reserve([one.plan.lora for one in candidates.members.values()], 2)
    loss_model.speed_up()
    queue, step = AdapterQueue(bank, candidates, 0), 0
    if checkpoint:
        step = state.restore(checkpoint, lambda extra: _restored(extra, candidates, queue))
        logger.info("going on from %s", checkpoint)
    else:
        size, together = _capacity(plan, loss_model, candidates)
        state.extra |= {"population_size": size, "together": together, "failures": {}}
        bank.reserve((), size)
    queue.size = state.extra["population_size"]
    failures: dict[str, str] = state.extra["failures"]
    logger.info("%d adapters, up to %d train together", len(candidates.members), queue.size)
    display = FleetDisplay(candidates, plan.run.logging_steps)
    with listen() as stop, reporting(folder, plan.run, state.extra.get("log_bytes", 0), display) as (log, observers):

        def note(event: Event) -> None:
            if isinstance(event, Failed):
                failures[event.name] = f"{event.reason} in step {event.step}; rows {', '.join(event.rows)}"

        observers.append(note)
        population = Population(
            list(queue.members.values()),
            loss_model,
            bank,
            plan.run,
            queue=queue,
            together=state.extra["together"],
            steps=step,
            observers=observers,
            save=lambda: save(),
            stop_requested=stop,
        )

        def save() -> None:
            members = list(queue.members.values())
            slots = {member.name: member.slot for member in members}
            state.extra |= {"log_bytes": log.size, "together": population.together}
            state.extra |= {"slots": slots, "candidates": candidates.state()}
            state.save(population.steps, members)

        population.train()
        save()
    if len(failures) == len(candidates.members):
        raise TrainingError(f"every adapter failed; the first: {next(iter(failures.values()))}")
    return Trained(failures, queue.size)


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
    """How many train together, and how many of them in one pass: by memory, where nobody says."""
    wanted = len(candidates.members)
    if plan.population.population_size is not None:
        return min(plan.population.population_size, wanted), None
    members = candidates.members.values()
    size = max(one.plan.training.per_device_train_batch_size for one in members)
    longest = max(members, key=lambda one: int(np.sort(one.data.train.lengths)[-size:].sum())).data.train
    rows = [longest[int(i)] for i in longest.lengths.argsort()[-size:]]
    shapes, share = [one.plan.lora for one in members], plan.population.max_memory
    fitting, together = measured_capacity(loss_model, candidates.bank, shapes, rows, share, wanted)
    return min(fitting, wanted), together


def _restored(extra: Mapping[str, Any], candidates: FleetCandidates, queue: AdapterQueue) -> list[Member]:
    queue.bank.reserve((), extra["population_size"])
    candidates.load(extra["candidates"])
    return [queue.place(candidates.candidate_of(name), slot) for name, slot in extra["slots"].items()]


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
