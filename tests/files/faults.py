"""A disk that fails: the n-th call that changes it raises, or is the last thing that its process comes to."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "replace", "rename", "link", "mkdir")
DELETIONS = ("unlink", "rmdir")


class FailingDisk:
    """Counts calls that change the disk; call number ``fail_at`` raises ``OSError(error)``, a write half done.

    Without an error the process is killed there.
    """

    def __init__(self, fail_at: int | None, error: int | None) -> None:
        self.fail_at, self.error, self.calls = fail_at, error, 0

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            changes = name != "open" or args[1] & os.O_CREAT
            self.calls += bool(changes)
            if changes and self.calls == self.fail_at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    raise OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return call


@contextmanager
def failing_disk(fail_at: int | None, error: int | None) -> Iterator[FailingDisk]:
    disk = FailingDisk(fail_at, error)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS if error is not None else CALLS + DELETIONS:
            patch.setattr(os, name, disk.wrap(name, getattr(os, name)))
        yield disk


def count_calls(work: Callable[[], Any]) -> int:
    with failing_disk(None, 0) as disk:
        work()
    return disk.calls
