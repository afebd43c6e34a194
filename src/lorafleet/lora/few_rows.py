"""Frozen weights laid out for products of a few rows: what decoding does with them, one step after another.

Libraries lay a weight out for many rows. Of few, a product is as fast as its weight is read: narrow blocks of the
transposed weight, each read in one go and multiplied into registers, by oneMKL's batched product. On two AVX2 cores all
products of eight rows of SmolLM2 took 49 ms so and 69 in oneDNN's layout, of one row 40 and 52.
"""

from collections.abc import Callable
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lorafleet.lora.grouped_gemm import Gemms, Products, Sizes

FEW = 16
"""Rows up to which blocks can be the faster layout."""


class FewRows:
    """A frozen ``(out, in)`` matrix on a CPU for products of up to ``FEW`` rows.

    Args:
        blocks: Its transposed columns in blocks of ``width``, one after another; the last may be narrower.
        shape: ``(out, in)``.
        width: Of a block.

    Attributes:
        starts: Where each block's columns of the result begin, in bytes.
    """

    def __init__(self, blocks: Tensor, shape: tuple[int, int], width: int) -> None:
        self._blocks, self._shape, self._width = blocks, shape, width
        out, inner = shape
        whole, rest = divmod(out, width)
        self._widths = [width] * whole + [rest] * bool(rest)
        self.starts = np.arange(len(self._widths)) * width * blocks.element_size()
        self._weights = blocks.data_ptr() + self.starts * inner
        self._products: dict[tuple[int, float], Products] = {}
        self._gemms: dict[tuple[int, float], Gemms] = {}
        self._lock = Lock()  # of the prepared products' places

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
        return right and 0 < len(x) <= FEW

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x·Wᵀ + b`` for ``x (rows, in)`` that it takes."""
        x, rows = x.contiguous(), x.shape[0]
        y = x.new_empty(rows, self._shape[0]) if bias is None else bias.repeat(rows, 1)
        with self._lock:
            gemms = self._prepared(rows, 0.0 if bias is None else 1.0)
            _, inputs, results = gemms.places[0]
            inputs.fill(x.data_ptr())
            np.add(self.starts, y.data_ptr(), out=results)
            gemms()
        return y

    def products(self, rows: int, beta: float = 0.0) -> Products:
        """The products for so many rows; whoever calls them writes where x is, and the result's blocks (``starts``)."""
        known = self._products.get((rows, beta))
        if known is None:
            count, (out, inner) = len(self._widths), self._shape
            inside = [inner] * count
            # Fortran reads rows as columns: yᵀ = W·xᵀ, block by block.
            sizes = Sizes(self._widths, [rows] * count, inside, self._widths, inside, [out] * count, [1.0] * count)
            unknown = np.zeros_like(self._weights)
            known = self._products[rows, beta] = Products("NN", sizes, (self._weights, unknown, unknown), beta)
        return known

    def _prepared(self, rows: int, beta: float) -> Gemms:
        known = self._gemms.get((rows, beta))
        if known is None:
            known = self._gemms[rows, beta] = Gemms([self.products(rows, beta)], self._blocks.dtype)
        return known
