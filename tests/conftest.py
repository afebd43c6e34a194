"""One thread for the tests and what they start: on tiny tensors a second thread costs more than it does."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def one_order() -> Iterator[None]:
    """Two threads, which share products between them, and a CPU on which sums of any number of rows have one order."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or not torch.backends.mkl.is_available():
        pytest.skip("oneMKL's kernels for AVX2 add in one order for any number of rows; others have not been looked at")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
