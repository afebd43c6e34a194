"""What the figures were taken on."""

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.job import package_versions
from lorafleet.models.machine import matmul_peak

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "lorafleet")


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system, versions, and the rate of large matrix products now."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": package_versions(*_PACKAGES),
        "matmul_gflops": round(matmul_peak() / 1e9, 1),
    }


def _processor() -> str:
    """Its name; Linux tells it only in /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
