"""A checkpoint is complete and verified, or it is not there."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lorafleet.errors import CheckpointError
from lorafleet.files import atomic
from lorafleet.files.checkpoint import load_checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint
from tests.files.faults import count_calls, failing_disk

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(7), "half": torch.ones(2).bfloat16()}
STATE = {"loss": 0.1 + 0.2, "best": math.inf, "bad": math.nan, "names": ["ä", "b"], "nested": {"x": None, "y": True}}


def save(folder: Path, step: int, value: float = 0.0) -> Path:
    return save_checkpoint(folder, step, {"w": torch.full((50,), value)}, {"value": value})


def value_of(path: Path) -> float:
    tensors, state = load_checkpoint(path)
    assert torch.equal(tensors["w"], torch.full((50,), state["value"]))
    return float(state["value"])


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run", 7, TENSORS, STATE)
    assert path.name == "checkpoint-7"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    tensors, state = load_checkpoint(path)
    assert all(torch.equal(tensors[n], TENSORS[n]) and tensors[n].dtype == TENSORS[n].dtype for n in TENSORS)
    assert math.isnan(state.pop("bad"))
    assert state == {key: value for key, value in STATE.items() if key != "bad"}


def test_newest_counts_numbers_and_passes_over_the_incomplete(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-100" / "state.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_old_checkpoint_good(tmp_path: Path, error: int) -> None:
    save(tmp_path / "dry", 1, 1.0)
    total = count_calls(lambda: save(tmp_path / "dry", 2, 2.0))
    assert total >= 10
    for call in range(2, total + 1):  # call 1 is the mkdir of the run's folder, which is there
        run = tmp_path / str(call)
        save(run, 1, 1.0)
        with (
            failing_disk(call, error),
            pytest.raises(CheckpointError, match=rf"(?s)checkpoint-2.*{os.strerror(error)}"),
        ):
            save(run, 2, 2.0)
        assert value_of(run / "checkpoint-1") == 1.0
        newest = newest_checkpoint(run)
        assert newest is not None
        assert value_of(newest) in (1.0, 2.0)  # 2 where only the last flush failed
        assert value_of(save(run, 2, 3.0)) == 3.0
        assert prune_checkpoints(run, 1) == [run / "checkpoint-1"]
        assert sorted(p.name for p in run.iterdir()) == ["checkpoint-2"]


def test_a_disk_too_full_for_the_tensors_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 1.0)

    def refuse(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(atomic, "save_file", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: .*No space left.*checkpoint-1 is still good"):
        save(tmp_path, 2, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_a_good_checkpoint_of_the_same_step(tmp_path: Path, error: int) -> None:
    save(tmp_path / "dry", 5, 1.0)
    total = count_calls(lambda: save(tmp_path / "dry", 5, 2.0))
    for call in range(2, total + 1):
        run = tmp_path / str(call)
        save(run, 5, 1.0)
        with failing_disk(call, error), pytest.raises(CheckpointError):
            save(run, 5, 2.0)
        newest = newest_checkpoint(run)
        assert newest is not None, f"call {call} of {total}"
        assert value_of(newest) in (1.0, 2.0)


def test_a_crash_while_replacing_the_same_step_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5, 1.0)
    (tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-5.replaced")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert value_of(newest) == 1.0
    save(tmp_path, 5, 2.0)
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-5"
    prune_checkpoints(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1, 1.5)
    data = (path / name).read_bytes()
    for position in range(0, len(data), max(1, len(data) // 40)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        (path / name).write_bytes(changed)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged.*delete .*checkpoint-1"):
            load_checkpoint(path)
    (path / name).write_bytes(data)
    assert value_of(path) == 1.5


def test_all_damage_is_named_at_once(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    (path / "state.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"(?s)2 faults.*state.safetensors has 5 bytes.*state.json is missing"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"state.json": {}}}', "[" * 100_000])
def test_damaged_manifests(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        load_checkpoint(path)
    assert newest_checkpoint(tmp_path) is None


def test_unknown_formats_and_absent_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(CheckpointError, match="never finished"):
        load_checkpoint(tmp_path / "checkpoint-3")


def test_prune_keeps_the_newest_and_the_protected_and_foreign_folders(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    foreign = tmp_path / "checkpoint-3"  # no manifest: another tool's
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-2.partial")
    deleted = prune_checkpoints(tmp_path, 2, protect={4, 99})
    assert [p.name for p in deleted] == ["checkpoint-2", "checkpoint-6"]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4", "checkpoint-8", "checkpoint-10"}


def test_a_checkpoint_that_cannot_be_deleted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "rename", refuse)
    assert prune_checkpoints(tmp_path, 1) == []
    assert "cannot delete the old checkpoint" in caplog.text
    assert value_of(tmp_path / "checkpoint-1") == 0.0


def test_killed_while_saving_over_and_over(tmp_path: Path) -> None:
    """Whatever moment SIGKILL hits, the newest checkpoint verifies."""
    script = (
        "import sys, torch; from lorafleet.files.checkpoint import *\n"
        "step = 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    step += 1\n"
        "    tensors = {'w': torch.full((50,), float(step))}\n"
        "    save_checkpoint(sys.argv[1], step % 5 + 1, tensors, {'value': float(step)})\n"
        "    prune_checkpoints(sys.argv[1], 2)\n"
    )
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        value_of(newest)
