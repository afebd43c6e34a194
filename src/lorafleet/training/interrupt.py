"""Ctrl-C and SIGTERM ask a run to save and stop."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether somebody asked the run to stop, and with which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """True after the first signal."""
        return self.signal is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the signal; a second Ctrl-C stops at once."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("%s: finishing this step and saving a checkpoint", signal.Signals(number).name)


@contextmanager
def listen() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM within a ``with`` block; outside the main thread, where Python cannot, do nothing."""
    request = StopRequest()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
