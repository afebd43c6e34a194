"""What layers that read the same input answer: prepared once for a routing, then computed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorafleet.lora.dense_rows import DenseRows, takes_dense_rows
from lorafleet.lora.functional import add_bias, base_products, lora_linears
from lorafleet.lora.mixed_rows import MixedRows, takes_mixed_rows
from lorafleet.lora.packed import PackedWeight, pack
from lorafleet.lora.routing import Segment, remember

if TYPE_CHECKING:
    from lorafleet.lora.layer import LoraLinear


class JointWeight(NamedTuple):
    """The frozen weights of layers that read the same input as one, for answering.

    Args:
        packed: The weights one below another, ``(out_1 + … + out_n, in)``.
        bias: Their biases one after another, or none.
        widths: ``out_1, …, out_n``.
    """

    packed: PackedWeight
    bias: Tensor | None
    widths: list[int]

    def products(self, x: Tensor, *, single: bool) -> tuple[Tensor, ...]:
        """Each layer's ``x·Wᵀ + b``, columns of one tensor; ``single`` as in ``PackedWeight.linear``."""
        found: tuple[Tensor, ...] = self.packed.linear(x, self.bias, single=single).split_with_sizes(self.widths, dim=1)
        return found


def join_weights(layers: Sequence[LoraLinear]) -> JointWeight | None:
    """Pack the weights of layers that read the same input as one; none where that cannot be done."""
    biases = [layer.bias for layer in layers]
    given = [bias for bias in biases if bias is not None]
    if len(given) not in (0, len(biases)):
        return None
    weight = torch.cat([layer.oriented_weight.detach() for layer in layers])
    packed = pack(weight, training=False)
    if packed is None:
        return None
    return JointWeight(packed, torch.cat(given) if given else None, [layer.out_features for layer in layers])


class Plan:
    """What layers that read the same input do with a batch, kept as long as its routing and the adapters stay.

    Args:
        layers: The layers.
        tokens: Of the batch.
        lower: The precision that autocast asks for.
        laid: The router's segments, by which the batch is known again.
        single: Whether each token is another row's; what a row gets does not depend on the others then.
        state: What else it depends on.
    """

    def __init__(
        self,
        layers: Sequence[LoraLinear],
        tokens: int,
        lower: torch.dtype | None,
        laid: object,
        single: bool,
        state: tuple[object, ...],
    ) -> None:
        self.laid, self.single, self.state = laid, single, state
        self.segments = active_segments(layers, tokens)
        self.parts = [layer.tensors([layer.segment(s) for s in self.segments], lower) for layer in layers]
        self.drops = any(s.dropout for part in self.parts for s in part.segments)
        # Dropout draws its masks anew in each pass, and a weight in lower precision would be one more copy.
        self.kept = not self.drops and lower is None
        self.packed = all(layer.packed is not None for layer in layers)
        self.ranked = any(s.rank for part in self.parts for s in part.segments)
        self.magnitudes = any(layer.learns_magnitude[s.slot] for layer in layers for s in self.segments)
        self.mixed: MixedRows | None = None
        self._quick: Callable[[Tensor], Tensor] | None = None
        self._looked = False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None: it names places in memory, so a copy of the layers makes its own."""
        return type(None), ()

    def answers(self, x: Tensor, joint: JointWeight | None, first: LoraLinear) -> tuple[Tensor, ...]:
        """What the layers answer where nothing learns, in as few calls as can be: decoding makes many.

        Args:
            x: ``(tokens, in)``.
            joint: The layers' weights as one.
            first: The first of the layers.
        """
        if self.single and (y := self._quickly(x, joint)) is not None:
            return (y,) if joint is None else y.split_with_sizes(joint.widths, dim=1)
        mixed = self._mixes(x)
        one = [(s.start, s.stop) for s in self.segments] == [(0, x.shape[0])]
        dense = self._dense(x, first) if self.ranked and not mixed else None
        if self.ranked and not (mixed or one or dense):
            return lora_linears(x, self.parts)
        single = self.single
        found = base_products(x, self.parts, single=single) if joint is None else joint.products(x, single=single)
        if dense is not None:
            dense.add(x, found)
        elif mixed and single:
            if self.mixed is None:
                self.mixed = MixedRows(self.parts, [y.stride(0) for y in found])
            self.mixed.add(x, found)
        else:
            self._add_each(x, found)
        for y, layer in zip(found, self.parts, strict=True):
            add_bias(y, layer)
        return found

    def _quickly(self, x: Tensor, joint: JointWeight | None) -> Tensor | None:
        """The layers' answers side by side, by calls that are prepared once; none where that cannot be."""
        if not x.is_cpu or not x.is_contiguous():
            return None
        if not self._looked:
            self._looked, self._quick = True, self._prepared(x, joint)
        return None if self._quick is None else self._quick(x)

    def _prepared(self, x: Tensor, joint: JointWeight | None) -> Callable[[Tensor], Tensor] | None:
        packed, bias = (self.parts[0].packed, self.parts[0].bias) if joint is None else (joint.packed, joint.bias)
        few = packed.few(x) if packed is not None and (joint is not None or len(self.parts) == 1) else None
        if few is None or bias is not None or any(part.lora_bias is not None for part in self.parts) or not self.kept:
            return None
        if not self.segments:
            return partial(few.linear, bias=None)
        strides = [few.out] * len(self.parts)
        return MixedRows(self.parts, strides, few).answers if self._mixes(x) else None

    def _add_each(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Each segment by itself: grouped products add in an order that depends on the other segments."""
        for y, layer in zip(outputs, self.parts, strict=True):
            for s in layer.segments:
                if s.rank:
                    low_A, low_B = (low[s.slot, : s.rank].to(x.dtype) for low in (layer.lora_A, layer.lora_B))
                    y[s.start : s.stop].addmm_(x[s.start : s.stop] @ low_A.T, low_B, alpha=s.scaling)

    def _mixes(self, x: Tensor) -> bool:
        return self.ranked and takes_mixed_rows(x, self.parts)

    def _dense(self, x: Tensor, first: LoraLinear) -> DenseRows | None:
        """Copies of A and B for this plan; those of the one before are let go, as they may be large."""
        if first.dense is None or not first.dense.fits(self.parts):
            if not self.kept or not takes_dense_rows(x, self.parts):
                return None
            first.dense = DenseRows(self.parts, x)
        return first.dense if first.dense.isolates else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision that autocast asks for; none outside it, and on the meta device, which does not know it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def active_segments(layers: Sequence[LoraLinear], tokens: int) -> list[Segment]:
    """The segments of a batch whose slots change what one of the layers answers."""
    router = layers[0].router
    laid = router.segments(tokens) if router.enabled else ()
    return [s for s in laid if s.slot >= 0 and any(layer.active(s.slot) for layer in layers)]


def _plan_for(layers: Sequence[LoraLinear], x: Tensor, tokens: int, lower: torch.dtype | None) -> Plan:
    first = layers[0]
    router = first.router
    laid = router.segments(tokens) if router.enabled else ()
    single = router.routing is not None and router.routing.single(tokens)
    state = (router.version, len(layers), first.training, x.dtype, lower, single)
    known = first.plans.get(id(laid))
    if known is None or known.laid is not laid or known.state != state:
        known = Plan(layers, tokens, lower, laid, single, state)
        if known.kept:
            remember(first.plans, id(laid), known)
    return known


def outputs(layers: Sequence[LoraLinear], x: Tensor, joint: JointWeight | None = None) -> list[Tensor]:
    """What layers that read the same ``x (..., in)`` answer, each ``(..., out)``; ``joint`` is their weights as one."""
    features = layers[0].in_features
    tokens, lower = x.numel() // features, autocast_dtype(x)
    plan = _plan_for(layers, x, tokens, lower)
    if joint is not None and (torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu"):
        joint = None
    if joint is None and not plan.segments and not plan.packed:
        return [layer.base_layer(x) for layer in layers]
    flat = x if x.shape == (tokens, features) else x.reshape(tokens, features)
    if lower is not None:
        flat = flat.to(lower)
    learns = plan.drops or torch.is_grad_enabled()
    if learns:
        layers[0].dense = None  # the population's fused optimizer changes A and B unseen
    found = lora_linears(flat, plan.parts) if learns else plan.answers(flat, joint, layers[0])
    if plan.magnitudes:
        found = tuple(layer.stretch(y, part.segments) for layer, y, part in zip(layers, found, plan.parts, strict=True))
    return [*found] if x.ndim == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in found]
