"""Several processes at once, kills at any instant, a full disk: what was promised stays, and nothing is half there."""

import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from lorafleet.errors import LorafleetError, RegistryError
from lorafleet.registry.registry import Registry
from lorafleet.registry.upkeep import gc, verify
from tests.files.faults import count_calls, failing_disk
from tests.registry.adapters import adapter_folder
from tests.registry.postgres import postgres

PROCESSES, ROUNDS = 8, 5
BACKENDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # another user runs the server
        with postgres(Path(folder) / "server") as url:
            yield url


@pytest.fixture(params=BACKENDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Registry]:
    """Opens the same empty registry, again and again."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("server")
        with Registry(str(tmp_path / "registry"), url, create=True).database.writing() as connection:
            for table in ("moves", "aliases", "versions", "revisions"):
                connection.execute(text(f"DELETE FROM {table}"))
    return lambda: Registry(str(tmp_path / "registry"), url, create=True)


def in_process(work: Callable[[], Any]) -> int:
    """Fork, work, and leave with 0, or 1 after an exception that is shown."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_processes_that_add_and_promote_at_once(opened: Callable[[], Registry], tmp_path: Path) -> None:
    folders = [[adapter_folder(tmp_path / f"{p}-{r}", 10 * p + r) for r in range(ROUNDS)] for p in range(PROCESSES)]

    def work(mine: list[Path]) -> None:
        registry = opened()
        for folder in mine:
            version = registry.add(folder, "shared")
            while True:
                moves = registry.history("shared", "prod")
                try:
                    registry.promote(version.label, expect=moves[-1].after if moves else None)
                    break
                except RegistryError as error:
                    if "moved meanwhile" not in str(error):
                        raise

    processes = [in_process(lambda mine=mine: work(mine)) for mine in folders]  # type: ignore[misc]
    assert [exit_code(process) for process in processes] == [0] * PROCESSES
    registry = opened()
    assert [version.number for version in registry.versions()] == list(range(1, PROCESSES * ROUNDS + 1))
    history = registry.history("shared", "prod")
    assert [move.before for move in history] == [None, *(move.after for move in history[:-1])]
    assert sorted(move.after for move in history) == list(range(1, PROCESSES * ROUNDS + 1))
    assert verify(registry).versions == PROCESSES * ROUNDS


def work_until_killed(opened: Callable[[], Registry], folders: list[Path], seed: int, done: int) -> None:
    """Whatever a registry is used for, in any order; a byte is written when it is open and after each piece of work."""
    registry, dice = opened(), random.Random(seed)
    while True:
        os.write(done, b".")
        name = dice.choice(["one", "two"])
        try:
            match dice.randrange(7):
                case 6:
                    registry.folder(registry.find(name))
                case 0:
                    gc(registry, keep=2)
                case 1:
                    registry.rollback(name)
                case 2 | 3:
                    registry.promote(name)
                    numbers = [version.label for version in registry.versions(name)]
                    registry.promote(dice.choice(numbers))
                case _:
                    registry.add(dice.choice(folders), name)
        except LorafleetError as error:
            if "cannot" in str(error) or "fails" in str(error):
                raise


def kill_after(pieces: int, then: float, work: Callable[[int], None]) -> int:
    """Kill a process so many seconds after its n-th piece of work, however long that takes; how it ended."""
    read, write = os.pipe()
    process = in_process(lambda: work(write))
    os.close(write)  # so that a process that fails is not waited for
    for _ in range(pieces):
        os.read(read, 1)
    time.sleep(then)
    os.kill(process, signal.SIGKILL)
    os.close(read)
    return exit_code(process)


def check_versions(registry: Registry) -> None:
    for version in registry.versions():
        assert all(registry.blobs.has(digest) for digest in version.files.values()), version.label
        assert not (version.aliases and version.rejected)
        assert {path.name for path in registry.folder(version).iterdir()} == set(version.files)


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_any_instant(opened: Callable[[], Registry], tmp_path: Path, kills: int) -> None:
    folders = [adapter_folder(tmp_path / str(seed), seed) for seed in range(12)]
    dice = random.Random(0)
    opened()
    for kill in range(kills):
        work = partial(work_until_killed, opened, folders, kill)
        assert kill_after(kill % 8, dice.uniform(0.0, 0.04), work) == -signal.SIGKILL  # 0: while it opens the registry
        registry = opened()
        check_versions(registry)
    found = verify(registry)
    assert len(registry.history("one")) > 3 and found.versions > 2 and found.aliases > 0, "next to nothing was done"
    gc(registry)
    verify(registry)


@pytest.mark.parametrize(
    ("work", "after"),
    [
        (lambda registry, folder: registry.add(folder, "one"), ["one:1", "one:2", "one:3", "one:4"]),
        (lambda registry, folder: registry.folder(registry.find("one:2")), ["one:1", "one:2", "one:3"]),
        (lambda registry, folder: gc(registry, keep=2), ["one:2", "one:3"]),
    ],
    ids=["add", "folder", "gc"],
)
def test_a_kill_at_every_change_of_the_disk(
    tmp_path: Path, work: Callable[[Registry, Path], Any], after: list[str]
) -> None:
    start = Registry(str(tmp_path / "start"), create=True)
    for number in (1, 2, 3):
        start.add(adapter_folder(tmp_path / str(number), number), "one")
    start.folder(start.find("one:1"))
    folder, code, kills = adapter_folder(tmp_path / "new", 4), -signal.SIGKILL, 0

    def until(kill: int, place: Path) -> None:
        registry = Registry(str(place))
        with failing_disk(kill, None):
            work(registry, folder)

    while code == -signal.SIGKILL:
        kills += 1
        place = shutil.copytree(tmp_path / "start", tmp_path / f"killed-{kills}")
        code = exit_code(in_process(partial(until, kills, place)))
        registry = Registry(str(place))
        assert [version.label for version in registry.versions()] in (["one:1", "one:2", "one:3"], after)
        registry.add(tmp_path / "1", "again")  # its files and folder may be half deleted
        check_versions(registry)
        verify(registry)
        work(registry, folder)
        assert [version.label for version in registry.versions("one")] == after
        verify(registry)
    assert code == 0 and kills > 5


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_changes_nothing(tmp_path: Path, error: int) -> None:
    registry = Registry(str(tmp_path / "registry"), create=True)
    registry.add(adapter_folder(tmp_path / "a", 1), "reviews")
    calls = count_calls(lambda: registry.add(adapter_folder(tmp_path / "b", 2), "reviews"))
    failures = 0
    for fail_at in range(1, calls + 1):
        folder, before = adapter_folder(tmp_path / str(fail_at), 100 + fail_at), registry.versions()
        with failing_disk(fail_at, error), suppress(RegistryError):
            registry.add(folder, "reviews")
            continue  # the call that failed was not needed
        failures += 1
        assert registry.versions() == before
        verify(registry)
        assert registry.add(folder, "reviews").number == len(before) + 1
    assert failures > 5
    verify(registry)


def fill(registry: Registry, folders: list[Path]) -> None:
    for folder in folders:
        registry.add(folder, "reviews")


def test_a_full_database_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"), create=True)
    first = registry.add(adapter_folder(tmp_path / "a", 1), "reviews")
    registry.promote("reviews:1")

    def limit(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # no page more than there are

    registry.database.engine.dispose()
    event.listen(registry.database.engine, "connect", limit)
    with pytest.raises(RegistryError, match="database or disk is full"):
        fill(registry, [adapter_folder(tmp_path / str(seed), seed) for seed in range(2, 40)])
    event.remove(registry.database.engine, "connect", limit)
    registry.database.engine.dispose()
    assert registry.find("reviews@prod").revision == first.revision
    verify(registry)
    before = len(registry.versions())
    assert registry.add(adapter_folder(tmp_path / "again", 99), "reviews").number == before + 1
