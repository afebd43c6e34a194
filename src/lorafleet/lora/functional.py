"""The LoRA product as one autograd function over a flat batch of segments, for layers that read the same input.

For the rows of a segment of slot k:  y = x·Wᵀ + b + s_k · (m∘x)·A_kᵀ·B_kᵀ + c_k
with m a dropout mask already divided by 1-p, and c_k an optional trained change of the bias
(Hu et al. 2021, arXiv 2106.09685, eq. 3; several adapters in one batch as in Punica, arXiv 2310.18547).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorafleet.lora.segments import LinearTensors, RowGroups, dropout_mask, joined_mask, row_groups


def lora_linear_reference(x: Tensor, layer: LinearTensors) -> Tensor:
    """One layer of :func:`lora_linears` in plain autograd: the definition that tests hold the fast one against."""
    weight, bias, lora_A, lora_B, lora_bias, segments, _ = layer
    y = F.linear(x, weight, bias)
    parts, end = [], 0
    for slot, start, stop, rank, scaling, p, seed, trains_bias, frozen in segments:
        parts.append(y[end:start])
        rows = x[start:stop]
        dropped = rows * dropout_mask(seed, (stop - start, x.shape[1]), p, x) if p else rows
        trained = rank - frozen
        low_A, low_B = (
            torch.cat([low[slot, :trained], low[slot, trained:rank].detach()]).to(x.dtype) for low in (lora_A, lora_B)
        )
        part = y[start:stop] + scaling * (dropped @ low_A.T) @ low_B
        parts.append(part + lora_bias[slot].to(x.dtype) if lora_bias is not None and trains_bias else part)
        end = stop
    return torch.cat([*parts, y[end:]])


def base_products(x: Tensor, layers: Sequence[LinearTensors], *, single: bool = False) -> tuple[Tensor, ...]:
    """Each layer's ``x·Wᵀ + b``; ``single`` as in ``PackedWeight.linear``."""
    return tuple(
        layer.packed.linear(x, layer.bias, single=single) if layer.packed else F.linear(x, layer.weight, layer.bias)
        for layer in layers
    )


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
        outputs = base_products(x, layers)
        kept: list[Tensor] = []
        if layers[0].segments:
            joint = ctx.joint = _join(layers, x)
            mask = joined_mask(layers[0].segments, x)
            h = joint.groups.product(x if mask is None else x * mask, joint.joined_A(layers, x).mT)
            h.mul_(joint.scales)
            for layer, y, part, rank in zip(layers, outputs, h.split(joint.ranks, dim=1), joint.ranks, strict=True):
                joint.groups.add_product(y, part, joint.transposed_B(layer, rank, x))
                add_bias(y, layer)
            kept = [h]
        ctx.rest = rest
        ctx.save_for_backward(x, *tensors, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.rest)
        layers = _together(saved, ctx.rest)
        grads = tuple(grad.contiguous() for grad in grads)
        grad_x = _base_input_gradient(layers, grads) if ctx.needs_input_grad[0] else None
        low_grads: list[tuple[Tensor | None, ...]] = [(None, None)] * count
        if layers[0].segments:
            low_grads = _low_gradients(ctx.joint, x, saved[5 * count], layers, grads, grad_x)
        result: list[Tensor | None] = []
        for number, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
            needs_weight, needs_bias = ctx.needs_input_grad[2 + 5 * number : 4 + 5 * number]
            result += [grad.T @ x if needs_weight else None, grad.sum(0) if needs_bias else None]
            result += [*low_grads[number], _bias_gradient(layer, grad)]
        return grad_x, None, *result


def _together(tensors: Sequence[Any], rest: Sequence[tuple[Any, ...]]) -> list[LinearTensors]:
    """Put layers together from what autograd has to see, five tensors each, and the rest."""
    return [LinearTensors(*tensors[5 * i : 5 * i + 5], *one) for i, one in enumerate(rest)]


def add_bias(y: Tensor, layer: LinearTensors) -> None:
    """Add to each segment's rows what its slot has changed of the bias."""
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


class _Joint(NamedTuple):
    """How the segments of layers that read the same input meet their slots' A and B.

    Args:
        groups: The products by segment.
        slots: Picks the segments' slots from a tensor of all; a slice, which copies nothing, where they are in a row.
        ranks: Each layer's largest rank: what is past a slot's own is zero and adds nothing.
        scales: Of each row, ``(tokens, r_1 + … + r_n)``, or one for all of a row's ranks; 1 in rows of no segment.
    """

    groups: RowGroups
    slots: slice | Tensor
    ranks: list[int]
    scales: Tensor

    def joined_A(self, layers: Sequence[LinearTensors], like: Tensor) -> Tensor:
        """The segments' A, ``(segments, r_1 + … + r_n, in)``: the layers' one below another."""
        parts = [layer.lora_A[self.slots, :rank] for layer, rank in zip(layers, self.ranks, strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(like.dtype)

    def transposed_B(self, layer: LinearTensors, rank: int, like: Tensor) -> Tensor:
        """The segments' Bᵀ of one layer, ``(segments, r, out)``."""
        return layer.lora_B[self.slots, :rank].to(like.dtype)


def _join(layers: Sequence[LinearTensors], x: Tensor) -> _Joint:
    joint = _joint.__wrapped__ if x.is_meta else _joint  # an estimate counts each layer's
    return joint(
        tuple((s.slot, s.start, s.stop) for s in layers[0].segments),
        tuple(max(s.rank for s in layer.segments) for layer in layers),
        tuple(tuple(s.scaling for s in layer.segments) for layer in layers),
        tuple(size for layer in layers for size in layer.weight.shape),
        *(len(x), x.dtype, x.device),
    )


# A pass asks for the same at every layer, once for each group of layers that read the same input.
@lru_cache(maxsize=16)
def _joint(
    segments: tuple[tuple[int, int, int], ...],
    ranks: tuple[int, ...],
    scalings: tuple[tuple[float, ...], ...],
    sizes: tuple[int, ...],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Joint:
    numbers = [slot for slot, *_ in segments]
    first, stop = numbers[0], numbers[0] + len(numbers)
    in_a_row = numbers == list(range(first, stop))
    widths, by_layer = ([1], scalings[:1]) if len(set(scalings)) == 1 else ([*ranks], scalings)
    scales = torch.ones(tokens, sum(widths), dtype=dtype, device="cpu")
    for part, own in zip(scales.split(widths, dim=1), by_layer, strict=True):
        for (_, start, end), scaling in zip(segments, own, strict=True):
            part[start:end] = scaling
    scales = scales.to(device)
    return _Joint(
        row_groups([(start, end) for _, start, end in segments], scales, [*ranks, *sizes]),
        slice(first, stop) if in_a_row else torch.tensor(numbers, device=device),
        [*ranks],
        scales,
    )


def _low_gradients(
    joint: _Joint,
    x: Tensor,
    h: Tensor,
    layers: Sequence[LinearTensors],
    grads: Sequence[Tensor],
    grad_x: Tensor | None,
) -> list[tuple[Tensor | None, ...]]:
    """Each layer's gradients of A and B, from ``h = s·(m∘x)·Aᵀ``; LoRA's part of the input's is added to ``grad_x``."""
    groups, slots, ranks, scales = joint
    low, grads_B = [], []
    for layer, grad, part, rank in zip(layers, grads, h.split(ranks, dim=1), ranks, strict=True):
        low.append(groups.product(grad, joint.transposed_B(layer, rank, x).mT))
        grads_B.append(_to_slots(groups.outer_product(part, grad), slots, layer.lora_B))
    joined = groups.join(low)
    joined.mul_(scales)
    mask = joined_mask(layers[0].segments, x)
    parts = groups.outer_product(joined, x if mask is None else x * mask).split(ranks, dim=1)
    grads_A = [_to_slots(part, slots, layer.lora_A) for layer, part in zip(layers, parts, strict=True)]
    if grad_x is not None:
        onto = grad_x if mask is None else x.new_zeros(x.shape)
        groups.add_product(onto, joined, joint.joined_A(layers, x))
        if mask is not None:
            grad_x.addcmul_(onto, mask)
    for layer, *both in zip(layers, grads_A, grads_B, strict=True):
        for s in layer.segments:
            if s.frozen:
                for grad in both:
                    grad[s.slot, s.rank - s.frozen :] = 0
    return list(zip(grads_A, grads_B, strict=True))


def _to_slots(parts: Tensor, slots: slice | Tensor, like: Tensor) -> Tensor:
    """The segments' gradients where their slots are in a tensor of all slots; of a slot with two segments, the sum."""
    if parts.shape == like.shape and isinstance(slots, slice):
        return parts.to(like.dtype).contiguous()
    total = torch.zeros_like(like)
    rank_wide = total[:, : parts.shape[1]]
    if isinstance(slots, slice):
        rank_wide[slots] = parts.to(like.dtype)
    else:
        rank_wide.index_add_(0, slots, parts.to(like.dtype))
    return total


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
