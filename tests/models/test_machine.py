"""Devices, precisions, memory, and the doctor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import lorafleet
from lorafleet.cache import cache_folder
from lorafleet.errors import ConfigError
from lorafleet.models import machine
from lorafleet.models.machine import (
    available_memory_bytes,
    keep_large_allocations,
    matmul_peak,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
)


def test_auto_device_exists() -> None:
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == wanted
    assert pick_device("cpu") == torch.device("cpu")
    torch.empty(1, device=pick_device("auto"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpuu", r"device = 'cpuu' is no device; did you mean 'cpu'"),
        ("", r"device = '' is no device"),
        ("meta", r"device = 'meta' cannot run a base model"),
        ("cuda:99", r"device = 'cuda:99', but"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pick_device(name)


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert pick_dtype("auto", gpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert pick_dtype("auto", gpu) == torch.float32
    for name in ("int8", "nonsense", "Tensor"):
        with pytest.raises(ConfigError, match="no precision"):
            pick_dtype(name, cpu)


def test_memory() -> None:
    script = (
        "import torch; from lorafleet.models.machine import peak_memory_bytes; cpu = torch.device('cpu')\n"
        "before = peak_memory_bytes(cpu); x = torch.ones(200 << 18); del x; print(before, peak_memory_bytes(cpu))"
    )
    ballast = torch.ones(100 << 20)  # a child must not inherit the peak of its parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < after - (190 << 20)
    assert ballast.nbytes <= peak_memory_bytes(torch.device("cpu"))
    if not torch.cuda.is_available():  # CUDA's own libraries take as much
        assert before < ballast.nbytes + (200 << 20)
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "_CGROUP_FILES", ((limit, used),))
    unlimited = available_memory_bytes()
    limit.write_text("3000\n")
    used.write_text("1000\n")
    assert available_memory_bytes() == 2000
    used.write_text("4000\n")
    assert available_memory_bytes() == 0
    limit.write_text("max\n")
    assert available_memory_bytes() == pytest.approx(unlimited, rel=0.5)


def test_large_allocations_stay() -> None:
    script = (
        "import resource, torch; from lorafleet.models.machine import keep_large_allocations\n"
        "print(keep_large_allocations())\n"
        "def step(): torch.empty(64 << 20, dtype=torch.uint8).fill_(1)\n"
        "for _ in range(4): step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "True":
        assert int(faults) < 20 * (64 << 20) / 4096 / 2
    else:
        assert not keep_large_allocations()


def test_matmul_peak_is_a_rate() -> None:
    assert 1e8 < matmul_peak(size=128, seconds=0.05) < 1e15


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("LORAFLEET_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("LORAFLEET_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "lorafleet"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == Path.home() / ".cache" / "lorafleet"


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "not" / "yet"))
    facts = json.loads(json.dumps(lorafleet.doctor()))
    assert facts["lorafleet"] == lorafleet.__version__
    assert facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["cache"]["free_bytes"] > 0
    assert facts["matmul_gflops"] > 0.1
    assert not (tmp_path / "not").exists()
    for name, state in facts["extras"].items():
        assert state in ("installed", f"pip install 'lorafleet[{name}]'")


def test_doctor_names_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1 << 30)
    monkeypatch.setattr(machine, "_free_bytes", lambda _: 1 << 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10 * (os.cpu_count() or 1))
    problems = " ".join(lorafleet.doctor()["problems"])
    assert all(word in problems for word in ("less than 2 GiB of memory", "LORAFLEET_CACHE", "num_threads"))
