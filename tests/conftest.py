"""One thread for the tests and what they start: on tiny tensors a second thread costs more than it does."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def one_order() -> Iterator[None]:
    """Two threads, which share products between them, and a CPU on which sums of any number of rows have one order."""
    simd, cpus = torch.backends.cpu.get_cpu_capability(), Path("/proc/cpuinfo")
    known = simd == "AVX2" or (simd == "AVX512" and cpus.exists() and "AuthenticAMD" in cpus.read_text())
    if not known or not torch.backends.mkl.is_available():
        pytest.skip("sums of any number of rows have one order on AVX2 and AMD's AVX-512 cores; others are unknown")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
