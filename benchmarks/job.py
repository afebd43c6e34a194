"""What a peer is told to do and what it reports, as JSON between processes.

Imports neither torch nor lorafleet: a peer's memory and start are its own.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

IGNORED = -100
"""The label of a token that is not trained, as transformers has it."""


@dataclass(frozen=True)
class Job:
    """One run of one peer.

    Args:
        phase: ``parity`` takes the rows in order, batch by batch; in ``throughput`` each peer batches as it likes.
        model: Folder of the base.
        adapter: Folder of the adapter that every peer starts from, in PEFT's format.
        rows: Token ids and labels of each row; -100 marks what is not trained. In ``throughput`` the rows stand in
            the order of transformers' length-grouped batches.
        batch_size: Rows of a step.
        steps: Optimizer steps.
        skipped: First steps that are not timed.
        learning_rate: Peak of the linear schedule.
        warmup_steps: Steps in which the rate rises from 0.
        threads: CPU threads.
        seed: Of the peer's own shuffle.
        products: Whether lorafleet's process also times the matrix products that its batches need.
    """

    phase: Literal["parity", "throughput"]
    model: str
    adapter: str
    rows: list[dict[str, list[int]]]
    batch_size: int
    steps: int
    skipped: int
    learning_rate: float
    warmup_steps: int
    threads: int
    seed: int
    products: bool = False

    @property
    def batches(self) -> list[list[int]]:
        """Numbers of the rows of each step, in order."""
        return [
            list(range(i, min(i + self.batch_size, len(self.rows)))) for i in range(0, len(self.rows), self.batch_size)
        ]


@dataclass
class Result:
    """What one run of one peer measured.

    Args:
        losses: Mean loss of the supervised tokens of each step, in nats; of every step in ``parity``.
        seconds: Wall time of each step, from the end of the step before: batching and optimizer included.
        tokens: Real tokens of each step, padding not counted.
        peak_memory_bytes: Most memory that the process held while it loaded and trained.
        settings: What was chosen for this peer, in words.
        versions: Of the packages that do the work.
        products: Seconds that the matrix products of all tokens need, see ``matmul_peak``.
        products_once: The same where a beginning that all rows of a batch share is computed once.
        bare_seconds: Of the bare base on each step's batch, after the last step: forward and backward, no optimizer.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0
    settings: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    products: dict[str, Any] = field(default_factory=dict)
    products_once: dict[str, Any] = field(default_factory=dict)
    bare_seconds: list[float] = field(default_factory=list)


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass, or plain values, as JSON."""
    plain = asdict(value) if isinstance(value, Job | Result) else value
    path.write_text(json.dumps(plain, indent=None if isinstance(value, Job) else 1) + "\n", encoding="utf-8")


def serve(run: Callable[[Job], Result]) -> None:
    """The main function of a peer: read the job, run it, write the result."""
    serve_plain(lambda job: run(Job(**job)))


def serve_plain(run: Callable[[dict[str, Any]], Any]) -> None:
    """The same for a peer whose job is a plain mapping."""
    job_path, result_path = map(Path, sys.argv[1:3])
    write_json(result_path, run(json.loads(job_path.read_text(encoding="utf-8"))))


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions by package."""
    return {name: version(name) for name in names}


def peak_memory_bytes() -> int:
    """Most resident memory of this process so far, or since ``forget_peak``."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Let the peak start anew from what is held now. Only Linux can; elsewhere the old peak stays, an upper bound."""
    path = "/proc/self/clear_refs"
    if not os.access(path, os.W_OK):
        return False
    Path(path).write_text("5")
    return True
