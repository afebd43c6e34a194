"""The LoRA products of a batch of few rows and many slots where nothing learns: a step of decoding.

Each step makes hundreds of such products, and of one row each they are all overhead. So whatever does not change from
step to step is laid out once: two calls of oneMKL for all segments of all layers that read the same input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock

import numpy as np
from torch import Tensor

from lorafleet.lora.few_rows import FewRows
from lorafleet.lora.grouped_gemm import Gemms, Products, Sizes, has_grouped_gemm
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
    """``s_k · x·A_kᵀ·B_kᵀ`` for the rows of each slot k, for layers that read the same ``x``.

    Args:
        layers: Each with the same segments' rows, of which one has a rank at least. Made anew when a slot's rank, scale
            or place in memory changes.
        strides: From row to row of each layer's output, in elements.
        base: The layers' frozen weights as one, for so many rows, to be computed in the same call; outputs are then
            columns of one tensor.
    """

    def __init__(
        self, layers: Sequence[LinearTensors], strides: Sequence[int], base: tuple[FewRows, int] | None = None
    ) -> None:
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
        # Fortran reads rows as columns: lowᵀ = A·xᵀ, then yᵀ += s·B·lowᵀ.
        inside, leading = [inner] * len(products), [strides[p.layer] for p in products]
        down = Sizes(ranks, rows, inside, inside, inside, ranks, [1.0] * len(products))
        up = Sizes(outs, rows, ranks, outs, ranks, leading, [p.scaling for p in products])
        first = [Products("TN", down, (of_A, self._x_places, lows), 0.0)]
        self._base, self._lock = base, Lock()  # of the places and of x·Aᵀ
        if base is not None:
            first.append(base[0].products(base[1]))
            self._y_places += np.array([0, *accumulate(widths)])[self._y_layers] * size
        self._down = Gemms(first, dtype)
        self._up = Gemms([Products("NN", up, (of_B, lows, self._y_places), 1.0)], dtype)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add to ``outputs (rows, out)``, one for each layer, what the slots add for ``x (rows, in)``."""
        starts = np.array([y.data_ptr() for y in outputs])[self._y_layers]
        with self._lock:
            np.add(self._x_places, x.data_ptr(), out=self._down.places[0][1])
            np.add(self._y_places, starts, out=self._up.places[0][2])
            self._down()
            self._up()

    def answers(self, x: Tensor) -> Tensor:
        """The outputs side by side ``(rows, out_1 + … + out_n)`` for ``x (rows, in)``, with the base's part."""
        assert self._base is not None
        few, rows = self._base
        y = x.new_empty(rows, few.out)
        at_x, at_y = x.data_ptr(), y.data_ptr()
        (_, inputs, _), (_, base_inputs, results) = self._down.places
        with self._lock:
            np.add(self._x_places, at_x, out=inputs)
            base_inputs.fill(at_x)
            np.add(few.starts, at_y, out=results)
            np.add(self._y_places, at_y, out=self._up.places[0][2])
            self._down()
            self._up()
        return y


def takes_mixed_rows(x: Tensor, layers: Sequence[LinearTensors]) -> bool:
    """Whether :class:`MixedRows` takes a batch ``x (rows, in)``: of a CPU, in the precision of A and B."""
    return has_grouped_gemm(x) and x.dtype == layers[0].lora_A.dtype and x.is_contiguous()
