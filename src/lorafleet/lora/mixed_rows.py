"""The LoRA products of a batch of few rows and many slots where nothing learns: a step of decoding.

Each step makes hundreds of such products, and of one row each they are all overhead. So whatever does not change from
step to step is laid out once: two grouped products for all rows of all layers that read the same input.

What a row gets is the same to the bit, whatever the others are: oneMKL too adds in one order where each product has
one row and all of a call have a multiple of ``_STEP`` sums. Rows of one slot as one product would be added in others.
"""

from collections.abc import Sequence
from itertools import accumulate
from threading import Lock

import numpy as np
from torch import Tensor

from lorafleet.lora.few_rows import FewRows
from lorafleet.lora.grouped_gemm import Gemms, Numbers, Sizes, has_grouped_gemm
from lorafleet.lora.segments import LinearTensors

_STEP = 4


class MixedRows:
    """``s_k · x·A_kᵀ·B_kᵀ`` for the rows of each slot k, for layers that read the same ``x``.

    Args:
        layers: Each with the same segments' rows, of which one has a rank at least. Made anew when a slot's rank, scale
            or place in memory changes.
        strides: From row to row of each layer's output, in elements.
        base: The layers' frozen weights as one; outputs are then columns of one tensor.
    """

    def __init__(self, layers: Sequence[LinearTensors], strides: Sequence[int], base: FewRows | None = None) -> None:
        # A layer's number, the row, and what it does with it.
        products = [
            (i, row, s)
            for i, layer in enumerate(layers)
            for s in layer.segments
            if s.rank
            for row in range(s.start, s.stop)
        ]
        dtype, size = layers[0].lora_A.dtype, layers[0].lora_A.element_size()
        inner, one = layers[0].lora_A.shape[2], [1] * len(products)
        # What is past a slot's rank is zero.
        sums = [min(-(-s.rank // _STEP) * _STEP, layers[i].lora_A.shape[1]) for i, _, s in products]
        self._low = layers[0].lora_A.new_empty(sum(sums))
        lows = np.array([0, *accumulate(sums)][:-1]) * size + self._low.data_ptr()
        of_A, of_B = (
            np.array(
                [
                    low.data_ptr() + s.slot * low.stride(0) * size
                    for low, (_, _, s) in zip(owners, products, strict=True)
                ]
            )
            for owners in ([layers[i].lora_A for i, _, _ in products], [layers[i].lora_B for i, _, _ in products])
        )
        self._x_places = np.array([row * inner * size for _, row, _ in products])
        self._y_places = np.array([row * strides[i] * size for i, row, _ in products])
        self._y_layers = np.array([i for i, _, _ in products])
        widths = [layer.lora_B.shape[2] for layer in layers]
        self._base, self._lock = base, Lock()  # of the places and of x·Aᵀ
        if base is not None:
            self._y_places += np.array([0, *accumulate(widths)])[self._y_layers] * size
        # Fortran reads rows as columns: lowᵀ = A·xᵀ, then yᵀ += s·B·lowᵀ.
        inside, outs = [inner] * len(products), [widths[i] for i, _, _ in products]
        ranks, scalings = [s.rank for _, _, s in products], [s.scaling for _, _, s in products]
        down = Sizes(sums, one, inside, inside, inside, sums, [1.0] * len(products))
        up = Sizes(outs, one, ranks, outs, sums, [strides[i] for i, _, _ in products], scalings)
        self._down = Gemms("TN", down, (of_A, self._x_places.copy(), lows), 0.0, dtype)
        self._up = Gemms("NN", up, (of_B, lows, self._y_places.copy()), 1.0, dtype)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add to ``outputs (rows, out)``, one for each layer, what the slots add for ``x (rows, in)``."""
        self._add(x, np.array([y.data_ptr() for y in outputs])[self._y_layers])

    def answers(self, x: Tensor) -> Tensor:
        """The outputs side by side ``(rows, out_1 + … + out_n)`` for ``x (rows, in)``, with the base's part."""
        assert self._base is not None
        y = self._base.linear(x, None)
        self._add(x, y.data_ptr())
        return y

    def _add(self, x: Tensor, starts: Numbers | int) -> None:
        with self._lock:
            np.add(self._x_places, x.data_ptr(), out=self._down.places[1])
            np.add(self._y_places, starts, out=self._up.places[2])
            self._down()
            self._up()


def takes_mixed_rows(x: Tensor, layers: Sequence[LinearTensors]) -> bool:
    """Whether :class:`MixedRows` takes a batch ``x (rows, in)``: of a CPU, in the precision of A and B."""
    return has_grouped_gemm(x) and x.dtype == layers[0].lora_A.dtype and x.is_contiguous()
