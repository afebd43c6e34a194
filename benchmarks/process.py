"""Runs one part of a benchmark in a process of its own, and watches who else uses the machine meanwhile."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.job import write_json
from lorafleet.errors import LorafleetError

ROOT = Path(__file__).parents[1]


class BenchmarkError(LorafleetError):
    """A peer failed, or the peers do not compute the same."""


def run_module(peer: str, module: str, job: Any, folder: Path, threads: int) -> tuple[Any, float]:
    """Run ``python -m benchmarks.peers.<module>`` on a job.

    Args:
        peer: Its name in messages.
        module: Reads the job from the file of its first argument, writes JSON to that of its second.
        job: What it is told.
        folder: For both files and for what the process prints.
        threads: CPU threads.

    Returns:
        What it measured, and the cores that others used meanwhile.

    Raises:
        BenchmarkError: The process failed; the message has the end of its output.
    """
    job_path, result_path = folder / "job.json", folder / "result.json"
    write_json(job_path, job)
    arguments = [f"benchmarks.peers.{module}", str(job_path), str(result_path)]
    _, _, others = run_watched(peer, arguments, threads)
    return json.loads(result_path.read_text(encoding="utf-8")), others


def run_watched(peer: str, arguments: Sequence[str], threads: int) -> tuple[str, float, float]:
    """Run ``python -m`` with arguments.

    Args:
        peer: Its name in messages.
        arguments: A module and its arguments.
        threads: CPU threads.

    Returns:
        Its standard output, its seconds from start to end, and the cores that others used meanwhile.

    Raises:
        BenchmarkError: The process failed; the message has the end of its output.
    """
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = os.environ | limits | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    before, own_before, start = _busy_seconds(), _children_seconds(), time.perf_counter()
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, errors="replace", check=False)
    if done.returncode:
        end = (done.stdout + done.stderr)[-3000:]
        raise BenchmarkError(f"{peer} failed with exit code {done.returncode}; its output ends with:\n{end}")
    seconds = time.perf_counter() - start
    others = (_busy_seconds() - before - (_children_seconds() - own_before)) / seconds
    return done.stdout, seconds, max(0.0, others)


def _busy_seconds() -> float:
    """Processor time that anything used, or the hypervisor took away, since the machine started."""
    times: dict[str, float] = psutil.cpu_times()._asdict()
    return sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system
