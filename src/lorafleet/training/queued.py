"""Training of adapters that wait in a queue: room for them, checkpoints, the log, interruption."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import RunConfig
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import LoraBank
from lorafleet.training.checkpoint import RunState
from lorafleet.training.events import Observer
from lorafleet.training.interrupt import listen
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from lorafleet.training.queue import AdapterQueue, Candidates
from lorafleet.training.report import Display, reporting

logger = logging.getLogger(__name__)


def train_queued(
    candidates: Candidates,
    shapes: Sequence[LoraConfig],
    bank: LoraBank,
    loss_model: LossModel,
    run: RunConfig,
    state: RunState,
    checkpoint: Path | None,
    *,
    room: Callable[[], tuple[int, int | None]],
    display: Callable[[], Display],
    observers: Sequence[Observer] = (),
) -> None:
    """Train until nothing waits and everything has ended.

    Args:
        candidates: Who trains.
        shapes: What adapters can look like.
        bank: Its slots are empty.
        loss_model: The base with that bank.
        run: Of the folder and the log.
        state: Saves and restores; its ``extra`` has then also ``population_size``, ``together`` and the ``seconds``
            of training, those before an interruption included.
        checkpoint: To go on from.
        room: Says how many train together, and how many of them in one pass; asked once in a run.
        display: Makes what shows events to people.
        observers: Called with every event, too.

    Raises:
        CheckpointError: The checkpoint is damaged or belongs to another run.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    started = time.perf_counter()
    bank.reserve(shapes, 2)
    loss_model.speed_up()
    queue, step = AdapterQueue(bank, candidates, 0), 0
    if checkpoint:
        step = state.restore(checkpoint, lambda extra: _restored(extra, queue))
        logger.info("going on from %s", checkpoint)
    else:
        size, together = room()
        state.extra |= {"population_size": size, "together": together}
        bank.reserve((), size)
    before = float(state.extra.get("seconds", 0.0))
    queue.size, together = state.extra["population_size"], state.extra["together"]
    passes = f", {together} of them in a pass" if together and together < queue.size else ""
    logger.info("up to %d train together%s", queue.size, passes)
    logged = state.extra.get("log_bytes", 0)
    with listen() as stop, reporting(state.output_dir, run, logged, display()) as (log, own):
        population = Population(
            list(queue.members.values()),
            loss_model,
            bank,
            run,
            queue=queue,
            together=together,
            steps=step,
            observers=[*own, *observers],
            save=lambda: save(),
            stop_requested=stop,
        )

        def save() -> None:
            members = list(queue.members.values())
            state.extra |= {
                "log_bytes": log.size,
                "seconds": before + time.perf_counter() - started,
                "together": population.together,
                "candidates": candidates.state(),
                "slots": {member.name: member.slot for member in members},
            }
            state.save(population.steps, members)

        if not checkpoint:
            save()  # how many train together is found out once, even if the run is killed at once
        population.train()
        save()


def _restored(extra: Mapping[str, Any], queue: AdapterQueue) -> list[Member]:
    queue.bank.reserve((), extra["population_size"])
    queue.candidates.load(extra["candidates"])
    return [queue.place(queue.candidates.candidate_of(name), slot) for name, slot in extra["slots"].items()]
