"""LoRA of an embedding: the linear map of one-hot rows, in which ``A·x`` is a column of A.

For a token i of a segment of slot k:  y = e · (W0[i] + s_k · A_k[:, i]ᵀ·B_kᵀ)
with W0 the table ``(vocabulary, width)``, A ``(r, vocabulary)`` and e the factor by which some models scale what they
look up (Hu et al. 2021, arXiv 2106.09685, eq. 3; names and scale as in PEFT). There is no dropout, as in PEFT.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.lora.segments import LinearTensors


def add_lookups(
    y: Tensor, ids: Tensor, layer: LinearTensors, factor: float | Tensor, padding_idx: int | None
) -> Tensor:
    """``y`` and what the segments' slots add to it, in plain autograd.

    Args:
        y: What the table answers, ``(tokens, width)``.
        ids: Of the tokens, ``(tokens,)``.
        layer: Its A and B, and the segments.
        factor: e.
        padding_idx: The id whose column of A gets no gradient, as its row of the table would get none.
    """
    # Unbound once, so that the gradients of all slots are put together once.
    lows_A, lows_B = layer.lora_A.unbind(), layer.lora_B.unbind()
    parts, end = [], 0
    for s in layer.segments:
        low_A, low_B = (_with_frozen(lows[s.slot], s.rank, s.frozen) for lows in (lows_A, lows_B))
        found = F.embedding(ids[s.start : s.stop], low_A.T, padding_idx).to(y.dtype)
        added = (found @ low_B.to(y.dtype)) * (s.scaling * factor)
        parts += [y[end : s.start], y[s.start : s.stop] + added.to(y.dtype)]
        end = s.stop
    return torch.cat([*parts, y[end:]])


def _with_frozen(low: Tensor, rank: int, frozen: int) -> Tensor:
    if not frozen:
        return low[:rank]
    return torch.cat([low[: rank - frozen], low[rank - frozen : rank].detach()])
