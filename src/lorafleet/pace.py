"""Progress of long work as log lines: how much is done, how fast, how long it still takes."""

import logging
import time

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Pace:
    """Counts what is done and logs it every ten seconds; short work stays silent.

    Args:
        what: What is done, with its unit, such as ``rows answered``.
        total: How much there is.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._started = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Note that ``count`` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = self.done / (now - self._started)
        left = round((self.total - self.done) / rate)
        logger.info(
            "%d of %d %s, %.1f a second, %d:%02d left", self.done, self.total, self.what, rate, *divmod(left, 60)
        )
