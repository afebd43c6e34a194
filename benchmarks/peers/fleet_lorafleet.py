"""``lorafleet.fleet`` on the users of ``benchmarks.fleet``."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

import lorafleet
from benchmarks.job import peak_memory_bytes, serve_plain
from lorafleet.files.adapter import WEIGHTS


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train all users' adapters, and keep them in a registry; seconds of training, and what both take of the disk."""
    torch.set_num_threads(job["threads"])
    result = lorafleet.fleet(job["fleet"])
    opened = lorafleet.Registry(job["fleet"]["registry"])
    kept = opened.versions()
    sizes, uses = opened.blobs.sizes(), Counter(digest for one in kept for digest in set(one.files.values()))
    weights = sum(sizes[one.files[WEIGHTS]] for one in kept)
    common = sum(sizes[digest] for digest, count in uses.items() if count > 1)
    in_registry = _files(job["fleet"]["registry"])
    in_run = _files(f"{job['fleet']['output_dir']}/adapters")
    return {
        "seconds": result.train_seconds,
        "whole_seconds": result.seconds,
        "population_size": result.population_size,
        "steps": sum(member.steps for member in result.members),
        "tokens": result.tokens,
        "users": len(kept),
        "weight_bytes": weights,
        "common_bytes": common,
        "own_bytes": sum(in_registry.values()) - weights - common,
        "run_bytes": sum(size for inode, size in in_run.items() if inode not in in_registry),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _files(folder: str) -> dict[int, int]:
    """Bytes of every file by its inode: one with several names is there once."""
    files = [path.stat() for path in Path(folder).rglob("*") if path.is_file()]
    return {file.st_ino: file.st_size for file in files}


if __name__ == "__main__":
    serve_plain(run)
