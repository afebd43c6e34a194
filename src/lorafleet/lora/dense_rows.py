"""The LoRA products of few rows where nothing learns and each call costs more than its arithmetic: a GPU's decoding.

All slots of a batch stand in one matrix; a row's products with those that are not its own are set to zero. That is two
calls for all layers that read the same input and one more for each, whatever the number of slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafleet.lora.segments import LinearTensors

MOST_ROWS = 128
"""Rows up to which products with other rows' slots cost next to nothing."""


class DenseRows:
    """Adds ``s_k · x·A_kᵀ·B_kᵀ`` to the rows of each slot k, for layers that read the same ``x``.

    Args:
        layers: Each with the same segments' rows; A and B are copied, in the precision of ``x``.
        x: A batch ``(rows, in)``; those to come have its rows, precision and place.
    """

    def __init__(self, layers: Sequence[LinearTensors], x: Tensor) -> None:
        self._layers, self._changes = layers, _changes(layers)
        slots = sorted({s.slot for s in layers[0].segments})
        places = torch.tensor(slots, device=x.device)
        ranks = [max(s.rank for s in layer.segments) for layer in layers]
        self._widths = [len(slots) * rank for rank in ranks]
        low_A = [layer.lora_A.detach()[places, :rank].flatten(0, 1) for layer, rank in zip(layers, ranks, strict=True)]
        self._A = torch.cat(low_A).to(x.dtype)
        self._B = [
            layer.lora_B.detach()[places, :rank].flatten(0, 1).to(x.dtype)
            for layer, rank in zip(layers, ranks, strict=True)
        ]
        scales = torch.zeros(len(x), sum(self._widths))
        for part, layer, rank in zip(scales.split(self._widths, dim=1), layers, ranks, strict=True):
            for s in layer.segments:
                first = slots.index(s.slot) * rank
                part[s.start : s.stop, first : first + s.rank] = s.scaling
        self._scales = scales.to(x)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None: a copy of the layers makes its own."""
        return type(None), ()

    def fits(self, layers: Sequence[LinearTensors]) -> bool:
        """Whether it was made of these, and A and B are still as they were copied."""
        return self._layers is layers and self._changes == _changes(layers)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add to ``outputs (rows, out)``, one for each layer, what the slots add for ``x (rows, in)``."""
        low = (x @ self._A.T).mul_(self._scales)
        for y, part, low_B in zip(outputs, low.split(self._widths, dim=1), self._B, strict=True):
            y.addmm_(part, low_B)


def _changes(layers: Sequence[LinearTensors]) -> list[tuple[int, int]]:
    return [(layer.lora_A._version, layer.lora_B._version) for layer in layers]
