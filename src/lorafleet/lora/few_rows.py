"""Frozen weights laid out for products of a few rows: what decoding does with them, one step after another.

Libraries lay a weight out for many rows. Of few, a product is as fast as its weight is read: narrow blocks of the
transposed weight, each read in one go and multiplied into registers by the grouped product. On two AVX2 cores, with
oneMKL's, all products of eight rows of SmolLM2 took 49 ms so and 69 in oneDNN's layout, of one row 40 and 52.
"""

from collections.abc import Callable
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lorafleet.lora.grouped_gemm import Gemms, Sizes

LEAST = 4
"""Rows that are computed at least. From so many on oneMKL too adds in one order, whatever the number of rows."""


class FewRows:
    """A frozen ``(out, in)`` matrix on a CPU for products of few rows.

    What a row gives is the same to the bit, alone or among others, where kernels are made so: ours, oneMKL's for AVX2.

    Args:
        blocks: Its transposed columns in blocks of ``width``, one after another; the last may be narrower.
        shape: ``(out, in)``.
        width: Of a block.
    """

    def __init__(self, blocks: Tensor, shape: tuple[int, int], width: int) -> None:
        self._blocks, self._shape, self._width = blocks, shape, width
        out, inner = shape
        whole, rest = divmod(out, width)
        self._widths = [width] * whole + [rest] * bool(rest)
        self._starts = np.arange(len(self._widths)) * width * blocks.element_size()
        self._weights = blocks.data_ptr() + self._starts * inner
        self._gemms: dict[tuple[int, float], Gemms] = {}
        self._lock = Lock()  # of the prepared products' places, and of:
        zeros = [blocks.new_zeros(LEAST, inner) for _ in range(1, LEAST)]
        self._padded = [(all_rows, all_rows[: i + 1]) for i, all_rows in enumerate(zeros)]

    @property
    def out(self) -> int:
        """Columns of a result."""
        return self._shape[0]

    @classmethod
    def of(cls, weight: Tensor, width: int) -> Self:
        """Lay out a weight."""
        out, inner = weight.shape
        count = out // width
        parts = weight[: count * width].reshape(count, width, inner).mT, weight[count * width :].T
        return cls(torch.cat([part.flatten() for part in parts]), (out, inner), width)

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Tensor, tuple[int, int], int]]:
        """A copy has places of its own."""
        return type(self), (self._blocks, self._shape, self._width)

    def takes(self, x: Tensor) -> bool:
        """Whether a batch is for :meth:`linear`."""
        right = x.device.type == "cpu" and x.dtype == self._blocks.dtype and x.shape[1] == self._shape[1]
        return right and len(x) > 0

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x·Wᵀ + b`` for ``x (rows, in)`` that it takes."""
        asked, x = x.shape[0], x.contiguous()
        rows = max(asked, LEAST)
        y = x.new_empty(rows, self._shape[0]) if bias is None else bias.repeat(rows, 1)
        with self._lock:
            if asked < LEAST:
                padded, head = self._padded[asked - 1]
                head.copy_(x)
                x = padded
            gemms = self._prepared(rows, 0.0 if bias is None else 1.0)
            _, inputs, results = gemms.places
            inputs.fill(x.data_ptr())
            np.add(self._starts, y.data_ptr(), out=results)
            gemms()
        return y[:asked] if asked < LEAST else y

    def _prepared(self, rows: int, beta: float) -> Gemms:
        known = self._gemms.get((rows, beta))
        if known is None:
            count, (out, inner) = len(self._widths), self._shape
            inside = [inner] * count
            places = self._weights, np.zeros_like(self._weights), np.zeros_like(self._weights)
            # Fortran reads rows as columns: yᵀ = W·xᵀ, block by block.
            sizes = Sizes(self._widths, [rows] * count, inside, self._widths, inside, [out] * count, [1.0] * count)
            known = self._gemms[rows, beta] = Gemms("NN", sizes, places, beta, self._blocks.dtype)
        return known
