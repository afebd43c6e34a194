"""The LoRA products of few rows where nothing learns and each call costs more than its arithmetic: a GPU's decoding.

All slots of a batch stand in one matrix; a row's products with those that are not its own are set to zero. That is
three calls for all layers that read the same input and one more for each, whatever the number of slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorafleet.lora.segments import LinearTensors

_MOST_ROWS, _MOST_COLUMNS = 128, 4096  # products with other rows' slots cost next to nothing up to here


def takes_dense_rows(x: Tensor, layers: Sequence[LinearTensors]) -> bool:
    """Whether :class:`DenseRows` is for a batch ``x (rows, in)``: few rows, and not all too many ranks."""
    slots = {s.slot for s in layers[0].segments}
    columns = len(slots) * sum(max(s.rank for s in layer.segments) for layer in layers)
    return not x.is_meta and len(x) <= _MOST_ROWS and columns <= _MOST_COLUMNS


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
        self._others = self._scales == 0
        self.isolates = all(bool(low_B.isfinite().all()) for low_B in self._B)
        """Whether a row gets nothing of other rows' slots: zero times what is no number would be none."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None: a copy of the layers makes its own."""
        return type(None), ()

    def fits(self, layers: Sequence[LinearTensors]) -> bool:
        """Whether it was made of these, and A and B are still as they were copied."""
        return self._layers is layers and self._changes == _changes(layers)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add to ``outputs (rows, out)``, one for each layer, what the slots add for ``x (rows, in)``."""
        low = (x @ self._A.T).mul_(self._scales).masked_fill_(self._others, 0)
        for y, part, low_B in zip(outputs, low.split(self._widths, dim=1), self._B, strict=True):
            y.addmm_(part, low_B)


def _changes(layers: Sequence[LinearTensors]) -> list[object]:
    return [_steps, *((layer.lora_A._version, layer.lora_B._version) for layer in layers)]


_steps = 0


def _count_step(*_: Any) -> None:
    """Fused optimizers change A and B without a trace."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)
