"""The LoRA products of a batch of few rows and many slots where nothing learns: a step of decoding.

Each step makes hundreds of such products, and of one row each they are all overhead. So whatever does not change from
step to step is laid out once: two calls of oneMKL for all segments of all layers that read the same input.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorafleet.lora.grouped_gemm import Numbers, gemm_function, has_grouped_gemm, real_type
from lorafleet.lora.segments import LinearTensors


@dataclass(frozen=True)
class _Product:
    """One layer's part of one segment, places in elements.

    Args:
        layer: Its number.
        rows: First row and number of rows.
        rank: Of the slot in this layer.
        scaling: Of the slot in this layer.
        low: Where its rows of ``x·Aᵀ`` begin.
        slot: The slot.
    """

    layer: int
    rows: tuple[int, int]
    rank: int
    scaling: float
    low: int
    slot: int


class MixedRows:
    """Adds ``s_k · x·A_kᵀ·B_kᵀ`` to the rows of each slot k, for layers that read the same ``x``.

    Args:
        layers: Each with the same segments' rows; made anew when a slot's rank, scale or place in memory changes.
        strides: From row to row of each layer's output, in elements.
    """

    def __init__(self, layers: Sequence[LinearTensors], strides: Sequence[int]) -> None:
        parts = [(i, s) for i, layer in enumerate(layers) for s in layer.segments if s.rank]
        starts = [0, *accumulate((s.stop - s.start) * s.rank for _, s in parts)]
        products = [
            _Product(i, (s.start, s.stop - s.start), s.rank, s.scaling, low, s.slot)
            for (i, s), low in zip(parts, starts, strict=False)
        ]
        dtype, size = layers[0].lora_A.dtype, layers[0].lora_A.element_size()
        self._low = layers[0].lora_A.new_empty(starts[-1])
        inner = layers[0].lora_A.shape[2]
        widths = [layer.lora_B.shape[2] for layer in layers]
        ranks, rows = [p.rank for p in products], [p.rows[1] for p in products]
        outs = [widths[p.layer] for p in products]
        self._x_places = np.array([p.rows[0] * inner * size for p in products])
        self._y_places = np.array([p.rows[0] * strides[p.layer] * size for p in products])
        self._y_layers = np.array([p.layer for p in products])
        lows = np.array([self._low.data_ptr() + p.low * size for p in products])
        of_A, of_B = (
            np.array([low.data_ptr() + p.slot * low.stride(0) * size for p, low in zip(products, owners, strict=True)])
            for owners in ([layers[p.layer].lora_A for p in products], [layers[p.layer].lora_B for p in products])
        )
        # Where rows of x and of the outputs lie now; written anew for each call.
        self._inputs, self._results = np.zeros_like(lows), np.zeros_like(lows)
        # Fortran reads rows as columns: lowᵀ = A·xᵀ, then yᵀ += s·B·lowᵀ.
        count, leading = len(products), [strides[p.layer] for p in products]
        down = _Sizes(ranks, rows, [inner] * count, ranks, [1.0] * count)
        up = _Sizes(outs, rows, ranks, leading, [p.scaling for p in products])
        self._down = _Gemms(b"T", down, (of_A, self._inputs, lows), 0.0, dtype)
        self._up = _Gemms(b"N", up, (of_B, lows, self._results), 1.0, dtype)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add to ``outputs (rows, out)``, one for each layer, what the slots add for ``x (rows, in)``."""
        if not len(self._inputs):
            return
        np.add(self._x_places, x.data_ptr(), out=self._inputs)
        np.add(self._y_places, np.array([y.data_ptr() for y in outputs])[self._y_layers], out=self._results)
        self._down()
        self._up()


class _Sizes(NamedTuple):
    """Rows and columns of each C, columns of M, from column to column of C, and factors: in Fortran's order."""

    m: list[int]
    n: list[int]
    k: list[int]
    leading: list[int]
    alpha: list[float]


class _Gemms:
    """Products ``C = alpha·M·V + beta·C`` in Fortran's order, each of its own size.

    Args:
        letter: Whether M is transposed.
        sizes: Of each product; those of the same sizes in a row are one group of oneMKL's.
        places: Addresses of each product's M, V and C, read at each call.
        beta: 1 adds to C.
        dtype: Of all of them.
    """

    def __init__(
        self, letter: bytes, sizes: _Sizes, places: tuple[Numbers, Numbers, Numbers], beta: float, dtype: torch.dtype
    ) -> None:
        groups = [(key, len(list(same))) for key, same in groupby(zip(*sizes, strict=True))]
        count = len(groups)
        number, real = ctypes.c_int64 * count, real_type(dtype) * count
        m, n, k, leading = (number(*(int(key[i]) for key, _ in groups)) for i in range(4))
        function = gemm_function(dtype)
        assert function is not None
        self._function, self._places = function, places  # held, as the arguments are addresses only
        of_m, of_v, of_c = (addresses.ctypes.data for addresses in places)
        self._arguments = (
            *(letter * count, b"N" * count, m, n, k, real(*(key[4] for key, _ in groups))),
            *(of_m, k if letter == b"T" else m, of_v, k, real(*[beta] * count), of_c, leading),
            *(ctypes.byref(ctypes.c_int64(count)), number(*(same for _, same in groups))),
        )

    def __call__(self) -> None:
        """Run them."""
        self._function(*self._arguments)


def takes_mixed_rows(x: Tensor, layers: Sequence[LinearTensors]) -> bool:
    """Whether :class:`MixedRows` takes a batch ``x (rows, in)``: of a CPU, in the precision of A and B."""
    return has_grouped_gemm(x) and x.dtype == layers[0].lora_A.dtype and x.is_contiguous()
