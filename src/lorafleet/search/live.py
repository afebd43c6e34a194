"""What a search shows while it runs: a table on a terminal, lines anywhere else."""

import logging
import sys
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lorafleet.search.objectives import DIRECTIONS
from lorafleet.search.space import in_words
from lorafleet.search.trials import Trials, trial_number
from lorafleet.training.events import Evaluated, Event, Failed, Finished, Pruned, Saved, StepDone
from lorafleet.training.report import clock

logger = logging.getLogger(__name__)

_BETWEEN = 0.5
"""Seconds between two tables, at least."""


class LiveTable:
    """Observer of a search.

    Args:
        trials: The trials, for what is not in the events.
        logging_steps: Steps of the population between lines.
        alone: Whether no other worker writes on the same terminal; a table needs it for itself.
    """

    def __init__(self, trials: Trials, logging_steps: int, alone: bool) -> None:
        self.trials, self.every = trials, logging_steps
        self._last: dict[str, StepDone] = {}
        self._held_out: dict[str, float] = {}
        self._rounds, self._seconds, self._tokens = 0, 0.0, 0
        self._lead: str | None = None
        self._drawn = 0.0
        self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
        self._shows = alone and sys.stderr.isatty()
        if self._shows:
            self._live.start()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Evaluated):
            self._held_out[event.name] = event.eval_loss
            logger.info("%s: held-out loss %.4f at step %d", event.name, event.eval_loss, event.step)
        elif isinstance(event, Failed):
            logger.warning("%s failed in step %d: %s", event.name, event.step, event.reason)
        elif isinstance(event, Saved):
            logger.info("saved %s", event.path)
        if isinstance(event, Finished | Pruned | Failed):
            self._last.pop(event.name, None)
            if not isinstance(event, Failed):
                what = "is done" if isinstance(event, Finished) else f"was stopped at step {event.step}"
                logger.info("%s %s", event.name, what)

    def _step(self, event: StepDone) -> None:
        self._last[event.name] = event
        self._tokens += event.tokens
        if self._lead not in self._last or self._lead == event.name:  # one of those training counts the rounds
            self._lead = event.name
            self._rounds += 1
            self._seconds += event.seconds
            if self._shows and time.monotonic() - self._drawn > _BETWEEN:  # each table reads the storage
                self._drawn = time.monotonic()
                self._live.update(self._table(), refresh=True)
            if self._rounds % self.every == 0:
                logger.info("%s", self._line())

    def _line(self) -> str:
        counts = self._counts()
        return (
            f"{counts['ended']} of {counts['all']} trials ended, {counts['pruned']} of them early; "
            f"{len(self._last)} runs train; {self._best()}{self._tokens / self._seconds:.0f} tokens/s "
            f"in {clock(self._seconds)}"
        )

    def _counts(self) -> dict[str, int]:
        states = [record.state for record in self.trials.study.records]
        ended = sum(state in ("complete", "pruned", "fail") for state in states)
        return {"all": len(states), "ended": ended, "pruned": states.count("pruned")}

    def _best(self) -> str:
        objective = self.trials.study.config.objectives[0]
        done = [record for record in self.trials.study.records if record.values is not None]
        if not done:
            return ""
        sign = 1 if DIRECTIONS[objective] == "minimize" else -1
        best = min(done, key=lambda record: sign * (record.values or [0.0])[0])
        return f"best so far trial {best.number} with {objective} {(best.values or [0.0])[0]:.4g}; "

    def _table(self) -> Table:
        table = Table("run", "settings", "step", "loss", "held-out loss", caption=self._line())
        for name, event in self._last.items():
            number = trial_number(name)
            settings = self.trials.study.record(number).notes.get("settings", {})
            held_out = self._held_out.get(name)
            cells = (f"{event.step}/{event.total_steps}", f"{event.loss:.4f}", f"{held_out:.4f}" if held_out else "")
            table.add_row(name, in_words(settings), *cells)
        return table

    def close(self) -> None:
        """Remove the table."""
        if self._shows:
            self._live.stop()
