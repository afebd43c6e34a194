"""Frozen weights laid out for oneDNN, once, for the forward product and in training for the input's gradient.

For answering, which is mostly decoding, products of few rows get a layout of their own where that is the faster one.

On two AVX-512 cores a packed weight made products of 190 to 740 rows 1.1 to 1.3 times faster than ``F.linear``, and the
output head's of 128 rows twice. It costs another copy of the weight for each direction; in return the original, where
it is mapped from a file, is let out of memory until somebody reads it. The operators are private to PyTorch, so they
are looked for and tried; without them nothing is packed.
"""

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from lorafleet.errors import ModelError
from lorafleet.lora.few_rows import FewRows
from lorafleet.lora.grouped_gemm import has_grouped_gemm

ROWS = 512
"""Rows that the layout is made for; it serves any number."""


_WIDTHS = (16, 24, 48)


class PackedWeight:
    """A frozen ``(out, in)`` matrix in oneDNN's layout; for training in both directions.

    Args:
        weight: The matrix.
        training: Whether gradients will be asked for.
        width: Of the blocks in which products of few rows read it; none to leave them to oneDNN.
    """

    def __init__(self, weight: Tensor, *, training: bool = True, width: int | None = None) -> None:
        self._forward = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self._backward: Tensor | None = None
        if training:
            self._backward = torch.ops.mkldnn._reorder_linear_weight(weight.detach().T.contiguous(), ROWS)

        self._few = None if width is None else FewRows.of(weight.detach(), width)

    def linear(self, x: Tensor, bias: Tensor | None, *, single: bool = False) -> Tensor:
        """``x·Wᵀ + b`` for ``x (rows, in)``; ``single`` rows by the layout for few, if there is one.

        It is not for the number of rows to say: what a row gives would depend on it.
        """
        if single and (few := self.few(x)) is not None:
            return few.linear(x, bias)
        # On AVX-512 cores oneDNN adds up one row in another order than each of several.
        return _product(x.repeat(2, 1), self._forward, bias)[:1] if len(x) == 1 else _product(x, self._forward, bias)

    def few(self, x: Tensor) -> FewRows | None:
        """The layout for few rows, if there is one and it takes ``x (rows, in)``."""
        return self._few if self._few is not None and self._few.takes(x) else None

    def input_gradient(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """``grad·W`` for ``grad (rows, out)``, added to ``onto`` if that is given."""
        if self._backward is None:
            raise ModelError("the weight was packed for answering only; speed up with training=True to train")
        if onto is None:
            return _product(grad, self._backward, None)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(grad, onto, self._backward, None, "add")
        return out


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def pack(weight: Tensor, *, training: bool = True) -> PackedWeight | None:
    """Pack a frozen float32 matrix on a CPU; none where PyTorch cannot, or where its answer is not the product."""
    frozen = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
    if not frozen or not _works():
        return None
    return PackedWeight(weight, training=training, width=None if training else _fastest_width())


@cache
def _fastest_width() -> int | None:
    """The width of blocks that is the fastest at eight rows here, none where oneDNN's layout is: tried once.

    It differs between processors. Five per cent are too little for another copy of the weights.
    """
    random = torch.Generator().manual_seed(0)
    weights, x = torch.randn(4, 1536, 576, generator=random), torch.randn(8, 576, generator=random)
    if not has_grouped_gemm(x):
        return None
    ways: dict[int | None, list[Callable[[Tensor, None], Tensor]]]
    ways = {width: [FewRows.of(weight, width).linear for weight in weights] for width in _WIDTHS}
    ways[None] = [PackedWeight(weight, training=False).linear for weight in weights]
    seconds: dict[int | None, list[float]] = {width: [] for width in ways}
    for _ in range(10):
        for width, products in ways.items():
            start = time.perf_counter()
            for product in products:
                product(x, None)
            seconds[width].append(time.perf_counter() - start)
    best = min(_WIDTHS, key=lambda width: median(seconds[width]))
    return best if median(seconds[best]) < 0.95 * median(seconds[None]) else None


def mapped_files() -> list[tuple[int, int]]:
    """First and last address + 1 of every file in this process's memory; none where there is no Linux to tell."""
    maps = Path("/proc/self/maps")
    lines = [line.split() for line in maps.read_text().splitlines()] if maps.exists() else []
    return [(int(start, 16), int(end, 16)) for start, _, end in (f[0].partition("-") for f in lines if f[4] != "0")]


def page_out(weight: Tensor, files: Sequence[tuple[int, int]]) -> None:
    """Let a weight that lies in one of ``files`` out of memory; whoever reads it gets the same bytes, from the file.

    Memory that no file backs stays as it is: the kernel would have to write it to swap. What was changed in place
    stays too, and the advice may be refused; then the weight just goes on to use memory.
    """
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    if any(first <= start and end <= last for first, last in files):
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), _MADV_PAGEOUT)


_MADV_PAGEOUT = 21  # from Linux's mman.h

_checked: list[bool] = []


def _works() -> bool:
    """Whether this PyTorch has the operators and they give products; found out once."""
    if not _checked:
        weight, x = torch.arange(48.0).view(6, 8) / 48, torch.arange(32.0).view(4, 8) / 32
        try:
            packed = PackedWeight(weight)
            right = torch.allclose(packed.linear(x, None), x @ weight.T, rtol=1e-5)
            _checked.append(
                right and torch.allclose(packed.input_gradient(x @ weight.T, x), x @ weight.T @ weight + x, rtol=1e-5)
            )
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):
            _checked.append(False)
    return _checked[0]
