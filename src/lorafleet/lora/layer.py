"""The LoRA layer: one frozen linear map, or a table of embeddings, and the A and B of every slot."""

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafleet.errors import AdapterError, ModelError
from lorafleet.lora.dense_rows import DenseRows
from lorafleet.lora.dora import rescale, row_norms
from lorafleet.lora.embedding import add_lookups
from lorafleet.lora.joint import Plan, active_segments, outputs
from lorafleet.lora.packed import PackedWeight, pack
from lorafleet.lora.routing import Router, Segment
from lorafleet.lora.segments import LinearTensors, LoraSegment


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a layer that LoRA adapts; an embedding takes in as many features as it has rows."""
    rows, columns = cast(Tensor, layer.weight).shape
    return (rows, columns) if _stored_transposed(layer) else (columns, rows)


def _stored_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, Conv1D | nn.Embedding)


def mix_key(key: int, index: int) -> int:
    """Mix two integers into one of 63 bits (the finaliser of splitmix64), for seeds that do not resemble each other."""
    z = (key + 0x9E3779B97F4A7C15 * (index + 1)) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1


def _frozen(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.to(dtype), requires_grad=False)


class LoraLinear(nn.Module):
    """A frozen linear layer with ``K`` slots: ``y = W0·x + scaling_k · B_k·A_k·x`` for the tokens of slot k.

    Args:
        base_layer: ``nn.Linear``, GPT-2's ``Conv1D``, or ``nn.Embedding``; kept as it is and frozen.
        num_slots: Number of slots K.
        r: Largest rank; ``lora_A`` is ``(K, r, in)``; ``lora_B`` is Bᵀ, ``(K, r, out)``, as the products read it.
            Smaller ranks are zero-padded.
        router: The routing in force; a layer of its own routing when not given.
        key: A number of its own, from which its dropout masks follow.

    Raises:
        AdapterError: ``base_layer`` is a LoRA layer already.
        ModelError: The layer's weight is not a plain floating-point matrix.
    """

    def __init__(
        self, base_layer: nn.Module, num_slots: int = 1, r: int = 8, router: Router | None = None, key: int = 0
    ) -> None:
        super().__init__()
        if isinstance(base_layer, LoraLinear):
            raise AdapterError(
                "this layer is a LoraLinear already; add an adapter to its bank instead of wrapping it again"
            )
        weight = getattr(base_layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise ModelError(
                f"{type(base_layer).__name__} has no plain floating-point weight matrix; LoraLinear takes "
                "nn.Linear, Conv1D and nn.Embedding, so load the base unquantized"
            )
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = linear_shape(base_layer)
        self.embeds = isinstance(base_layer, nn.Embedding)  # takes ids instead of features
        self.router = router or Router()
        self.key = key
        self.ranks, self.scalings, self.dropouts = [0] * num_slots, [0.0] * num_slots, [0.0] * num_slots
        self.trained_ranks = [0] * num_slots
        self.trains_bias = [False] * num_slots
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(weight.new_zeros((num_slots, r, self.in_features), dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_zeros((num_slots, r, self.out_features), dtype=dtype))
        self.lora_bias: nn.Parameter | None = None
        self.lora_magnitude: nn.Parameter | None = None
        self.learns_magnitude = [False] * num_slots
        self._weight_squares: Tensor | None = None
        self._norms: dict[int, tuple[tuple[int, int], Tensor]] = {}
        self.packed: PackedWeight | None = None
        self.shared_input: Callable[[LoraLinear, Tensor], Tensor] | None = None
        self.unmerged: tuple[Tensor, Tensor | None] | None = None
        self.plans: dict[int, Plan] = {}
        self.dense: DenseRows | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, stored as the base stores it."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def oriented_weight(self) -> Tensor:
        """The base's weight as ``(out, in)``, whichever way it is stored."""
        return self.weight.T if _stored_transposed(self.base_layer) else self.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias ``(out,)``, or none."""
        return cast("Tensor | None", getattr(self.base_layer, "bias", None))

    def grow(self, num_slots: int, r: int) -> None:
        """Make room for more slots or a larger rank; what the slots hold is kept, the parameters are new objects."""
        old_slots, old_r, _ = self.lora_A.shape
        slots, rank = max(num_slots, old_slots), max(r, old_r)
        if (slots, rank) == (old_slots, old_r):
            return
        self._norms.clear()
        self.plans.clear()  # they hold the old parameters
        self.dense = None
        self.router.version += 1
        new_A = self.lora_A.new_zeros((slots, rank, self.in_features))
        new_B = self.lora_B.new_zeros((slots, rank, self.out_features))
        new_A[:old_slots, :old_r], new_B[:old_slots, :old_r] = self.lora_A.data, self.lora_B.data
        self.lora_A, self.lora_B = nn.Parameter(new_A), nn.Parameter(new_B)
        if self.lora_bias is not None:
            new_bias = self.lora_bias.new_zeros((slots, self.out_features))
            new_bias[:old_slots] = self.lora_bias.data
            self.lora_bias = nn.Parameter(new_bias)
        if self.lora_magnitude is not None:
            new_magnitude = self.lora_magnitude.new_zeros((slots, self.out_features))
            new_magnitude[:old_slots] = self.lora_magnitude.data
            self.lora_magnitude = nn.Parameter(new_magnitude)
        missing = slots - old_slots
        self.ranks += [0] * missing
        self.trained_ranks += [0] * missing
        self.scalings += [0.0] * missing
        self.dropouts += [0.0] * missing
        self.trains_bias += [False] * missing
        self.learns_magnitude += [False] * missing

    def fill(self, slot: int, rank: int, scaling: float, dropout: float) -> None:
        """Give a slot its rank, scale and dropout."""
        self.router.version += 1
        self.ranks[slot] = self.trained_ranks[slot] = rank
        self.scalings[slot], self.dropouts[slot] = scaling, 0.0 if self.embeds else dropout

    def factors(self, slot: int) -> tuple[Tensor, Tensor]:
        """The slot's A ``(r, in)`` and Bᵀ ``(r, out)``, to be changed in place."""
        rank = self.trained_ranks[slot]
        return self.lora_A.detach()[slot, :rank], self.lora_B.detach()[slot, :rank]

    def take_off_start(self, slot: int) -> None:
        """Take the slot's ``B₀·A₀`` of now off its product, as rows behind the trained ones that nothing changes."""
        rank = self.trained_ranks[slot]
        self.router.version += 1
        self.ranks[slot] = 2 * rank
        lora_A, lora_B = self.lora_A.detach()[slot], self.lora_B.detach()[slot]
        lora_A[rank : 2 * rank], lora_B[rank : 2 * rank] = lora_A[:rank], -lora_B[:rank]

    def train_bias(self, slot: int) -> None:
        """Let a slot change the bias, if there is one: a row of a parameter ``(K, out)``, zero at the start."""
        if self.bias is None:
            return
        self.router.version += 1
        if self.lora_bias is None:
            self.lora_bias = nn.Parameter(self.lora_B.new_zeros((len(self.ranks), self.out_features)))
        self.trains_bias[slot] = True

    def learn_magnitude(self, slot: int, *, start: bool) -> None:
        """Give a slot lengths of its weight's rows, a row of a parameter ``(K, out)``; at the start those there are."""
        if self.lora_magnitude is None:
            self.lora_magnitude = nn.Parameter(self.lora_B.new_zeros((len(self.ranks), self.out_features)))
        self.router.version += 1
        self.learns_magnitude[slot] = True
        if start:
            self.lora_magnitude.detach()[slot] = self.norms(slot)

    def norms(self, slot: int) -> Tensor:
        """``‖W0 + scaling·B·A‖`` of each row, ``(out,)``; kept for calls without gradients until A or B changes."""
        state = (self.lora_A._version, self.lora_B._version)
        known = self._norms.pop(slot, None)
        # A pass with gradients comes before an optimizer's step, and fused ones do not count as a change of version.
        if known is None or known[0] != state or torch.is_grad_enabled():
            known = state, self._row_norms(slot)
        if not torch.is_grad_enabled():
            self._norms[slot] = known
        return known[1]

    @torch.no_grad()
    def _row_norms(self, slot: int) -> Tensor:
        rank = self.ranks[slot]
        if self._weight_squares is None:
            self._weight_squares = self.oriented_weight.to(self.lora_A.dtype).square().sum(1)
        low_A, low_B = self.lora_A[slot, :rank], self.lora_B[slot, :rank]
        return row_norms(self._weight_squares, self._base_product, low_A, low_B, self.scalings[slot])

    def _base_product(self, x: Tensor) -> Tensor:
        """``x·W0ᵀ`` in the weight's precision."""
        weight, packed = self.oriented_weight, self._usable_packed()
        return packed.linear(x, None) if packed else x.to(weight.dtype) @ weight.T

    def _usable_packed(self) -> PackedWeight | None:
        """None in a model that was moved or converted after packing: it answers in its new precision and place."""
        return self.packed if self.weight.dtype == torch.float32 and self.weight.device.type == "cpu" else None

    def clear(self, slot: int) -> None:
        """Empty a slot: rank 0 and nothing but zeros."""
        self.router.version += 1
        self.dense = None
        self.ranks[slot], self.scalings[slot], self.dropouts[slot], self.trains_bias[slot] = 0, 0.0, 0.0, False
        self.trained_ranks[slot], self.learns_magnitude[slot] = 0, False
        self._norms.pop(slot, None)
        with torch.no_grad():
            for parameter in (self.lora_A, self.lora_B, self.lora_bias, self.lora_magnitude):
                if parameter is not None:
                    parameter[slot].zero_()
                    if parameter.grad is not None:
                        parameter.grad[slot].zero_()

    def delta(self, slot: int) -> Tensor:
        """What one slot adds to the weight, ``(out, in)`` in the adapter's precision."""
        rank = self.ranks[slot]
        delta = self.scalings[slot] * (self.lora_B.data[slot, :rank].T @ self.lora_A.data[slot, :rank])
        if not self.learns_magnitude[slot]:
            return delta
        weight = self.oriented_weight.detach().to(delta.dtype)
        return delta + (self.factor(slot).detach()[:, None] - 1) * (weight + delta)

    def factor(self, slot: int) -> Tensor:
        """By how much the slot stretches each row of its weight, ``(out,)`` (DoRA)."""
        assert self.lora_magnitude is not None
        return self.lora_magnitude[slot] / self.norms(slot)

    def stretch(self, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        """Give the rows ``y (tokens, out)`` of slots that learn magnitudes the lengths they have learned."""
        slots = {s.slot for s in segments if self.learns_magnitude[s.slot]}
        if not slots:
            return y
        biases = {slot: self._bias(slot) for slot in slots}
        return rescale(y, segments, {slot: self.factor(slot) for slot in slots}, biases)

    def _bias(self, slot: int) -> Tensor | None:
        if self.bias is None or self.lora_bias is None or not self.trains_bias[slot]:
            return self.bias
        return self.bias + self.lora_bias[slot]

    def pack(self, *, training: bool) -> None:
        """Lay the frozen weight out for faster products, where that is possible; results change by rounding only."""
        self.packed = None if self.embeds else pack(self.oriented_weight, training=training)
        self.router.version += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Note that the layer was moved or converted."""
        self.router.version += 1
        self.dense = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def merge(self, slot: int) -> None:
        """Fold a slot into the base layer; the original parameters are kept.

        Raises:
            AdapterError: A slot is merged already.
        """
        if self.unmerged is not None:
            raise AdapterError("this layer is merged already; unmerge first")
        self.unmerged = (self.weight, self.bias)
        delta = self.delta(slot)
        # New parameters, so that a weight tied to another module changes here alone.
        self.base_layer.weight = _frozen(
            self.weight + (delta.T if _stored_transposed(self.base_layer) else delta), self.weight.dtype
        )
        if self.bias is not None and self.lora_bias is not None:
            self.base_layer.bias = _frozen(self.bias + self.lora_bias.data[slot], self.bias.dtype)

    def unmerge(self) -> None:
        """Put the original parameters back."""
        if self.unmerged is not None:
            self.base_layer.weight = cast(nn.Parameter, self.unmerged[0])
            if self.bias is not None:
                self.base_layer.bias = cast(nn.Parameter, self.unmerged[1])
            self.unmerged = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, segment by segment, its slot's update.

        Args:
            x: ``(..., in)``, or ids ``(...)`` for an embedding; the leading dimensions flattened are the tokens that
                the routing counts.

        Raises:
            RoutingError: The routing does not cover the batch.
        """
        if self.router.merged_slot is not None:
            return cast(Tensor, self.base_layer(x))
        if self.embeds:
            return self._looked_up(x)
        return self.shared_input(self, x) if self.shared_input else outputs([self], x)[0]

    def _looked_up(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base_layer(ids)
        segments = active_segments([self], ids.numel())
        if not segments:
            return y
        part = self.tensors([self.segment(s) for s in segments], None)
        # Gemma 3 and others scale what they look up, in their embedding's forward.
        table = cast(nn.Embedding, self.base_layer)
        factor = getattr(table, "embed_scale", 1.0)
        flat = add_lookups(y.flatten(0, -2), ids.flatten(), part, factor, table.padding_idx)
        return self.stretch(flat, part.segments).view(y.shape)

    def active(self, slot: int) -> bool:
        """Whether the slot's adapter changes this layer's output."""
        return self.ranks[slot] > 0 or self.trains_bias[slot]

    def rescale(self, slot: int, scaling: float) -> None:
        """Give the slot another scale."""
        self.router.version += 1
        self.scalings[slot] = scaling
        self._norms.pop(slot, None)

    def tensors(self, own: Sequence[LoraSegment], lower: torch.dtype | None) -> LinearTensors:
        """What a product of this layer takes, the base's part in ``lower`` precision under autocast."""
        weight, bias, packed = self.oriented_weight, self.bias, self._usable_packed()
        if lower is not None:
            weight, bias, packed = weight.to(lower), None if bias is None else bias.to(lower), None
        return LinearTensors(weight, bias, self.lora_A, self.lora_B, self.lora_bias, own, packed)

    def segment(self, segment: Segment) -> LoraSegment:
        """What this layer does with a segment."""
        slot, start, stop, key = segment
        p = self.dropouts[slot] if self.training else 0.0
        seed = 0
        if p:
            # Without a key the mask follows torch's global generator, as nn.Dropout's does.
            seed = mix_key(key, self.key) if key is not None else int(torch.randint(2**62, (1,)).item())
        rank, scaling, frozen = self.ranks[slot], self.scalings[slot], self.ranks[slot] - self.trained_ranks[slot]
        return LoraSegment(slot, start, stop, rank, scaling, p, seed, self.trains_bias[slot], frozen)

    def extra_repr(self) -> str:
        """Show shapes and ranks in a printed model."""
        return f"in={self.in_features}, out={self.out_features}, ranks={self.ranks}"
