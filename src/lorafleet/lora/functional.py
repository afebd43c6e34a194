"""The LoRA product as one autograd function over a flat batch of segments, for layers that read the same input.

For the rows of a segment of slot k:  y = x·Wᵀ + b + s_k · (m∘x)·A_kᵀ·B_kᵀ + c_k
with m a dropout mask already divided by 1-p, and c_k an optional trained change of the bias
(Hu et al. 2021, arXiv 2106.09685, eq. 3; several adapters in one batch as in Punica, arXiv 2310.18547).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorafleet.lora.packed import PackedWeight


class LoraSegment(NamedTuple):
    """What one layer does with rows ``start:stop``: its slot, that slot's rank, scale and dropout, and its bias."""

    slot: int
    start: int
    stop: int
    rank: int
    scaling: float
    dropout: float = 0.0
    mask_seed: int = 0
    trains_bias: bool = False


def dropout_mask(seed: int, shape: tuple[int, int], p: float, like: Tensor) -> Tensor:
    """A mask of zeros and ``1/(1-p)`` that follows from ``seed`` alone, so that the backward pass draws it again."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.empty(shape, dtype=like.dtype, device=like.device)
    return keep.bernoulli_(1 - p, generator=generator).div_(1 - p)


class LinearTensors(NamedTuple):
    """One layer of a joint product: its frozen weight, all slots' A and B, and what it does with each segment.

    Args:
        weight: Frozen base weight ``(out, in)``.
        bias: Base bias ``(out,)``, or none.
        lora_A: All slots' A ``(K, r_max, in)``; rows past a slot's rank are zero.
        lora_B: All slots' B ``(K, out, r_max)``; columns past a slot's rank are zero.
        lora_bias: All slots' trained change of the bias ``(K, out)``, or none.
        segments: Disjoint and in order; rows that none covers get the base alone.
        packed: The frozen weight in a faster layout, if it has one.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    segments: Sequence[LoraSegment]
    packed: PackedWeight | None = None


def lora_linear_reference(x: Tensor, layer: LinearTensors) -> Tensor:
    """One layer of :func:`lora_linears` in plain autograd: the definition that tests hold the fast one against."""
    weight, bias, lora_A, lora_B, lora_bias, segments, _ = layer
    y = F.linear(x, weight, bias)
    parts, end = [], 0
    for slot, start, stop, rank, scaling, p, seed, trains_bias in segments:
        parts.append(y[end:start])
        rows = x[start:stop]
        dropped = rows * dropout_mask(seed, (stop - start, x.shape[1]), p, x) if p else rows
        part = y[start:stop] + scaling * (dropped @ lora_A[slot, :rank].T.to(x.dtype)) @ lora_B[slot, :, :rank].T.to(
            x.dtype
        )
        parts.append(part + lora_bias[slot].to(x.dtype) if lora_bias is not None and trains_bias else part)
        end = stop
    return torch.cat([*parts, y[end:]])


class _Piece(NamedTuple):
    """Rows that one product serves: a segment, or all segments where they are equal and of consecutive slots."""

    start: int
    stop: int
    entries: int
    slots: int | slice
    ranks: list[int]
    scales: list[float | Tensor]
    mask: Tensor | None

    def rows(self, tensor: Tensor) -> Tensor:
        """These rows of ``(tokens, features)``, one batch entry a slot where there are several: a view."""
        rows = tensor[self.start : self.stop]
        return rows if self.entries == 1 else rows.view(self.entries, -1, tensor.shape[1])

    def joined_A(self, layers: Sequence[LinearTensors], like: Tensor) -> Tensor:
        """The layers' A one below another, ``(r_1 + … + r_n, in)``."""
        parts = [layer.lora_A[self.slots, :rank] for layer, rank in zip(layers, self.ranks, strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)).to(like.dtype)

    def scaled_B(self, layer: LinearTensors, number: int, like: Tensor) -> Tensor:
        """``s·Bᵀ`` of one layer, ``(r, out)``. On ``(out, r)`` in memory the rank-wide products ran 4 times slower."""
        B = layer.lora_B[self.slots, :, : self.ranks[number]]
        return (B.mT * self.scales[number]).to(like.dtype).contiguous()


def _pieces(layers: Sequence[LinearTensors], x: Tensor) -> list[_Piece]:
    segments = layers[0].segments
    if _even_run(segments, x.shape[0]):
        scales: list[float | Tensor] = [
            layer.lora_B.new_tensor([s.scaling for s in layer.segments])[:, None, None] for layer in layers
        ]
        slots = slice(segments[0].slot, segments[-1].slot + 1)
        return [_Piece(0, x.shape[0], len(segments), slots, [t.lora_A.shape[1] for t in layers], scales, None)]
    pieces = []
    for number, (slot, start, stop, _, _, p, seed, _) in enumerate(segments):
        own = [layer.segments[number] for layer in layers]
        mask = dropout_mask(seed, (stop - start, x.shape[1]), p, x) if p else None
        pieces.append(_Piece(start, stop, 1, slot, [s.rank for s in own], [s.scaling for s in own], mask))
    return pieces


def _even_run(segments: Sequence[LoraSegment], tokens: int) -> bool:
    """Whether the segments cover the batch in equal lengths over consecutive slots, so that one bmm serves all."""
    if len(segments) < 2:
        return False
    length = segments[0].stop - segments[0].start
    return length * len(segments) == tokens and all(
        s.start == i * length and s.stop == s.start + length and s.slot == segments[0].slot + i and not s.dropout
        for i, s in enumerate(segments)
    )


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``into += a·b``, for matrices or batches of them."""
    (into.addmm_ if into.ndim == 2 else into.baddbmm_)(a, b)


class _LoraLinears(torch.autograd.Function):
    """The products of layers that read the same input: its rows are read once for all of their A."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rest: Sequence[tuple[Any, ...]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers = _together(tensors, rest)
        outputs = tuple(
            layer.packed.linear(x, layer.bias) if layer.packed else F.linear(x, layer.weight, layer.bias)
            for layer in layers
        )
        kept: list[Tensor] = []
        for piece in _pieces(layers, x):
            rows = piece.rows(x) if piece.mask is None else piece.rows(x) * piece.mask
            h = rows @ piece.joined_A(layers, x).mT
            for number, (y, part) in enumerate(zip(outputs, h.split(piece.ranks, dim=-1), strict=True)):
                if piece.ranks[number]:
                    _add_product(piece.rows(y), part, piece.scaled_B(layers[number], number, x))
            kept.append(h)
        for layer, y in zip(layers, outputs, strict=True):
            _add_bias(y, layer)
        ctx.rest = rest
        ctx.save_for_backward(x, *tensors, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.rest)
        layers, kept = _together(saved, ctx.rest), saved[5 * count :]
        grads = tuple(grad.contiguous() for grad in grads)
        grad_x = _base_input_gradient(layers, grads) if ctx.needs_input_grad[0] else None
        found = [(torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)) for layer in layers]
        for piece, h in zip(_pieces(layers, x), kept, strict=True):
            _piece_gradients(piece, x, h, layers, grads, found, grad_x)
        result: list[Tensor | None] = []
        for number, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
            needs_weight, needs_bias = ctx.needs_input_grad[2 + 5 * number : 4 + 5 * number]
            result += [grad.T @ x if needs_weight else None, grad.sum(0) if needs_bias else None]
            low = found[number] if layer.segments else (None, None)
            result += [*low, _bias_gradient(layer, grad)]
        return grad_x, None, *result


def _together(tensors: Sequence[Any], rest: Sequence[tuple[Any, ...]]) -> list[LinearTensors]:
    """Put layers together from what autograd has to see, five tensors each, and the rest."""
    return [LinearTensors(*tensors[5 * i : 5 * i + 5], *one) for i, one in enumerate(rest)]


def _add_bias(y: Tensor, layer: LinearTensors) -> None:
    if layer.lora_bias is not None:
        for s in layer.segments:
            if s.trains_bias:
                y[s.start : s.stop] += layer.lora_bias[s.slot].to(y.dtype)


def _base_input_gradient(layers: Sequence[LinearTensors], grads: Sequence[Tensor]) -> Tensor:
    """``Σ grad_i·W_i``, each product added to the sum before it."""
    total: Tensor | None = None
    for layer, grad in zip(layers, grads, strict=True):
        if layer.packed is not None:
            total = layer.packed.input_gradient(grad, total)
        else:
            total = grad @ layer.weight if total is None else torch.addmm(total, grad, layer.weight)
    assert total is not None
    return total


def _piece_gradients(
    piece: _Piece,
    x: Tensor,
    h: Tensor,
    layers: Sequence[LinearTensors],
    grads: Sequence[Tensor],
    found: Sequence[tuple[Tensor, Tensor]],
    grad_x: Tensor | None,
) -> None:
    """Add a piece's share to the gradients of A and B (``found``) and of the input, in place."""
    low_grads = []
    for number, (layer, grad, part) in enumerate(zip(layers, grads, h.split(piece.ranks, dim=-1), strict=True)):
        g, grad_B = piece.rows(grad), found[number][1]
        low_grads.append(piece.scaled_B(layer, number, x) @ g.mT)  # (r, tokens)
        grad_B[piece.slots, :, : piece.ranks[number]] += ((part.mT @ g) * piece.scales[number]).mT
    g_low = low_grads[0] if len(layers) == 1 else torch.cat(low_grads, dim=-2)
    rows = piece.rows(x) if piece.mask is None else piece.rows(x) * piece.mask
    for (grad_A, _), part, rank in zip(found, (g_low @ rows).split(piece.ranks, dim=-2), piece.ranks, strict=True):
        grad_A[piece.slots, :rank] += part
    if grad_x is None:
        return
    if piece.mask is None:
        _add_product(piece.rows(grad_x), g_low.mT, piece.joined_A(layers, x))
    else:
        piece.rows(grad_x).add_((g_low.mT @ piece.joined_A(layers, x)) * piece.mask)


def _bias_gradient(layer: LinearTensors, grad: Tensor) -> Tensor | None:
    if layer.lora_bias is None:
        return None
    total = torch.zeros_like(layer.lora_bias)
    for s in layer.segments:
        if s.trains_bias:
            total[s.slot] += grad[s.start : s.stop].sum(0)
    return total


def lora_linears(x: Tensor, layers: Sequence[LinearTensors]) -> tuple[Tensor, ...]:
    """Base products and every segment's LoRA updates of layers that read the same input, with a hand-written backward.

    Args:
        x: Input ``(tokens, in)``.
        layers: Their segments have the same slots and rows in the same order; ranks and scales may differ. Dropout is
            for a layer by itself, as each layer has a mask of its own.

    Returns:
        Each layer's ``(tokens, out)``. Only ``x`` and rank-wide tensors are kept for the backward pass.
    """
    assert len(layers) == 1 or not any(s.dropout for layer in layers for s in layer.segments)
    rest = [(layer.segments, layer.packed) for layer in layers]
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, rest, *(tensor for layer in layers for tensor in layer[:5]))  # type: ignore[no-untyped-call]
    return outputs
