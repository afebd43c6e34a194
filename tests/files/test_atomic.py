"""Files are replaced whole or not at all."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorafleet.files.atomic import (
    save_tensors,
    sha256_file,
    sha256_json,
    tensor_bytes,
    write_bytes,
    write_files,
    write_json,
    write_text,
)
from tests.files.faults import count_calls, failing_disk

OLD = {"a": b"old a" * 100, "b": b"old b" * 100}
NEW = {"a": b"new a" * 200, "b": b"new b" * 200, "c": b"new c"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    write_text(path, "grüße")
    write_bytes(path, b"two")
    assert contents(path.parent) == {"file.txt": b"two"}
    write_json(path, {"b": 1, "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_bytes(tmp_path / "x", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_json_that_any_reader_takes(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"nan": float("nan"), "deep": [(float("inf"), 1.5)], "lone surrogate": "\ud800"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"nan": None, "deep": [[None, 1.5]], "lone surrogate": "?"}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("before", [OLD, {}], ids=["over old files", "into an empty folder"])
def test_a_failing_disk_changes_nothing(tmp_path: Path, error: int, before: dict[str, bytes]) -> None:
    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, data in before.items():
            (folder / file).write_bytes(data)
        return folder

    dry = fresh("dry")
    total = count_calls(lambda: write_files(dry, NEW))
    assert contents(dry) == {**before, **NEW}
    assert total >= 10
    failures = 0
    for step in range(1, total + 1):
        folder = fresh(str(step))
        number = None
        try:
            with failing_disk(step, error):
                write_files(folder, NEW)
        except OSError as raised:
            number = raised.errno
        # It goes through where mkdir found its folder there, or a hard link became a copy.
        assert number in (None, error)
        assert contents(folder) == (before if number else {**before, **NEW}), f"call {step} of {total}"
        failures += bool(number)
    assert failures >= total - 3


def test_a_real_write_error_keeps_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"good")
    script = (
        "import resource, signal, sys; from lorafleet.files.atomic import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(sys.argv[1], bytes(100_000))\n"
        "except OSError as error: print('refused', error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.stdout.strip() == f"refused {errno.EFBIG}", done.stderr
    assert contents(tmp_path) == {"x": b"good"}


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": whole.T,
        "row": whole[1],
        "column": whole[:, 2],
        "same": whole,
        "again": whole,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": whole.bfloat16(),
        "empty": torch.empty(0, 5),
        "needs_grad": torch.ones(2, requires_grad=True),
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())


def test_equal_tensors_give_equal_bytes_with_any_metadata(tmp_path: Path) -> None:
    metadata = {key: f"ü {key}" for key in "hgfedcba"}
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    script = (
        "import torch, sys; from lorafleet.files.atomic import tensor_bytes, sha256_json; import hashlib\n"
        "m = {key: f'ü {key}' for key in 'abcdefgh'}\n"
        "t = {'a': torch.zeros(2, 2), 'b': torch.ones(3)}\n"
        "print(hashlib.sha256(tensor_bytes(t, m)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    save_tensors(tmp_path / "x", tensors, metadata)
    assert sha256_file(tmp_path / "x") == done.stdout.strip()
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
    assert torch.equal(load_file(tmp_path / "x")["b"], torch.ones(3))


def test_plain_tensor_bytes_are_pefts(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(tensor_bytes({"a": torch.ones(2)}))
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_hash_of_json_ignores_the_order_of_keys() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})
    assert sha256_json([1, 2]) != sha256_json([2, 1])
