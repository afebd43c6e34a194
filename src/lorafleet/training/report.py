"""Where events go: progress on stderr, ``metrics.jsonl``, TensorBoard."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorafleet.config.training import RunConfig
from lorafleet.errors import Interrupted, MissingExtraError
from lorafleet.files.atomic import write_text
from lorafleet.files.run_folder import METRICS
from lorafleet.training.events import Evaluated, Event, Failed, Finished, Observer, Pruned, Saved, StepDone

logger = logging.getLogger(__name__)


def as_text(renderable: RenderableType) -> str:
    """Something rich can show, as plain text for a log line."""
    buffer = StringIO()
    Console(file=buffer, width=130).print(renderable)
    return buffer.getvalue().rstrip()


class Display(Protocol):
    """Shows events to people, until it is closed."""

    def __call__(self, event: Event) -> None:
        """Show one event."""

    def close(self) -> None:
        """Take down what is redrawn."""


@contextmanager
def reporting(
    folder: Path, run: RunConfig, logged: int, display: Display
) -> Iterator[tuple["MetricsLog", list[Observer]]]:
    """The log and all observers of a run, closed at its end.

    Args:
        folder: For the log.
        run: Where else events go, and the folder to go on in.
        logged: Bytes of the log that are kept.
        display: Shows events to people.

    Raises:
        Interrupted: The run was; the message says how to go on.
    """
    log = MetricsLog(folder / METRICS, logged)
    observers: list[Observer] = [log, display]
    if "tensorboard" in run.report_to:
        observers.append(tensorboard_observer(folder / "tensorboard"))
    try:
        yield log, observers
    except Interrupted as stopped:
        remedy = f"go on with: --resume-from-checkpoint true --output-dir {run.output_dir}"
        raise Interrupted(f"{stopped}; the checkpoint is in {folder}; {remedy}") from None
    finally:
        display.close()
        log.close()


class MetricsLog:
    """``metrics.jsonl``: one object for each event, in order.

    On resume, what was logged after the checkpoint is cut off, so that the file ends as if the run had not stopped.

    Args:
        path: The file.
        kept: Bytes of it to keep: ``size`` at the checkpoint.
    """

    def __init__(self, path: Path, kept: int) -> None:
        write_text(path, path.read_bytes()[:kept].decode() if path.exists() else "")
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Append one event."""
        if isinstance(event, Saved | Finished | Pruned):
            return  # where a run was saved differs when it was interrupted; the losses do not
        kind = {StepDone: "step", Evaluated: "eval", Failed: "failed"}[type(event)]
        record = {"event": kind} | asdict(event)
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}, ensure_ascii=False) + "\n")
        self._file.flush()

    @property
    def size(self) -> int:
        """Bytes so far, all of them on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Write everything to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class ProgressReport:
    """Progress for people: a bar on a terminal, a line every ``logging_steps`` in any case.

    Args:
        logging_steps: Steps between lines.
        done: Steps that an earlier run has done.
    """

    def __init__(self, logging_steps: int, done: int = 0) -> None:
        self.every = logging_steps
        self._losses: list[float] = []
        self._tokens, self._trained, self._seconds = 0, 0, 0.0
        self._done = done
        self._task: TaskID | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, *times, console=console, transient=True) if sys.stderr.isatty() else None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Evaluated):
            best = ", the best so far" if event.best else ""
            logger.info("step %d: held-out loss %.4f%s", event.step, event.eval_loss, best)
        elif isinstance(event, Saved):
            logger.info("step %d: saved %s", event.step, event.path)
        elif isinstance(event, Failed):
            logger.error(
                "%s stopped in step %d: %s; rows %s", event.name, event.step, event.reason, ", ".join(event.rows)
            )
        elif isinstance(event, Finished):
            logger.info("%s ended at step %d: %s", event.name, event.step, event.reason)

    def _step(self, event: StepDone) -> None:
        self._losses.append(event.loss)
        self._tokens += event.tokens
        self._trained += event.trained_tokens
        self._seconds += event.seconds
        if self._bar is not None:
            self._advance(event)
        if event.step % self.every and event.step not in (1, event.total_steps):
            return
        rate, trained = self._tokens / self._seconds, self._trained / self._seconds
        left = (event.total_steps - event.step) * self._seconds / max(1, len(self._losses))
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  |g| %.3f  %.0f tokens/s (%.0f trained)  %s left",
            *(event.step, event.total_steps, event.epoch, sum(self._losses) / len(self._losses)),
            *(event.learning_rate, event.grad_norm, rate, trained, clock(left)),
        )
        self._losses.clear()
        self._tokens, self._trained, self._seconds = 0, 0, 0.0

    def _advance(self, event: StepDone) -> None:
        assert self._bar is not None
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(f"training {event.name}", total=event.total_steps, completed=self._done)
        self._bar.update(self._task, completed=event.step, description=f"loss {event.loss:.4f}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def require_trackers(names: Sequence[str]) -> None:
    """Check that what ``report_to`` names is installed.

    Raises:
        MissingExtraError: TensorBoard is not.
    """
    if "tensorboard" in names and find_spec("tensorboard") is None:
        raise MissingExtraError("report_to tensorboard", "tensorboard")


def tensorboard_observer(folder: Path) -> Observer:
    """Write losses, rates and speeds for TensorBoard, every adapter's as a run of its own in ``folder``."""
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}

    def observe(event: Event) -> None:
        if isinstance(event, Saved):
            return
        if event.name not in writers:
            writers[event.name] = SummaryWriter(str(folder / event.name))
        writer = writers[event.name]
        if isinstance(event, StepDone):
            writer.add_scalar("train/loss", event.loss, event.step)
            writer.add_scalar("train/learning_rate", event.learning_rate, event.step)
            writer.add_scalar("train/grad_norm", event.grad_norm, event.step)
            writer.add_scalar("train/tokens_per_second", event.tokens / event.seconds, event.step)
        elif isinstance(event, Evaluated):
            writer.add_scalar("eval/loss", event.eval_loss, event.step)
        else:
            writer.close()

    return observe
