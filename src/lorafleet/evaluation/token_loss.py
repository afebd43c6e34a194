"""The loss of supervised tokens, computed where it counts and never for the whole vocabulary at once."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorafleet.data.batches import FlatBatch, Part, TrainRow, collate, count_targets
from lorafleet.lora import Routing, Slots
from lorafleet.lora.layer import mix_key
from lorafleet.lora.packed import PackedWeight, pack
from lorafleet.lora.slots import answering
from lorafleet.models.attention import FlatLayout, flat_inputs, use_flat_attention
from lorafleet.models.head import few_ids, plain_decoder
from lorafleet.models.lean import LeanLayers, Wanted, lean
from lorafleet.models.shared_prompts import SharedPrompts
from lorafleet.pace import Pace

CHUNK = 128
"""Targets whose logits exist at the same time: enough rows for a fast product, 25 MB at a vocabulary of 49k."""


ROWS = 32
"""Rows of logits that are turned into probabilities at once."""


class _HeadLoss(torch.autograd.Function):
    """Weighted cross-entropy behind an output head, with the gradients computed in the forward pass.

    ``L = Σ w_i (logsumexp(z_i) - z_i[t_i])``, ``z = h·Wᵀ + b``;  ``∂L/∂z_i = w_i (softmax(z_i) - onehot(t_i))``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        packed: PackedWeight | None,
    ) -> tuple[Tensor, Tensor]:
        needs_grad, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        losses, grad = weights.new_empty(len(hidden)), torch.empty_like(hidden if needs_grad else hidden[:0])
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = packed.linear(hidden[part], bias) if packed else F.linear(hidden[part], weight, bias)
            losses[part], probabilities = _softmax_losses(logits.to(weights.dtype), targets[part])
            if needs_grad:
                probabilities[torch.arange(len(probabilities)), targets[part]] -= 1
                # The weights scale rows, so they scale the narrow product instead of the wide factor.
                grad_logits = probabilities.to(hidden.dtype)
                product = packed.input_gradient(grad_logits) if packed else grad_logits @ weight
                grad[part] = product.mul_(weights[part, None])
                if grad_weight is not None or grad_bias is not None:
                    grad_logits = grad_logits.mul_(weights[part, None])
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[part])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(grad, grad_weight, grad_bias)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if one is None else one * grad_loss.to(one.dtype) for one in ctx.saved_tensors)
        return *grads, None, None, None


def _softmax_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``-log p`` of each target, and the probabilities in the logits' place, a few rows at a time: in the cache."""
    losses = []
    for z, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
        top, of_target = z.amax(dim=1, keepdim=True), z.gather(1, target[:, None])
        total = z.sub_(top).exp_().sum(dim=1, keepdim=True)
        z.div_(total)
        losses.append((total.log() + (top - of_target))[:, 0])
    return torch.cat(losses), logits


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a batch: ``total`` is the weighted sum to differentiate, ``parts`` each part's summed loss."""

    total: Tensor
    parts: tuple[float, ...]


class LossModel:
    """A base, prepared to give the loss of flat batches.

    What the model can do is found out once by comparing logits on a few tokens: flat attention or padded batches, and
    whether its logits are its head applied to its hidden states (some models scale or cap them, and then the model's
    own logits are used).

    Args:
        model: A causal language model of transformers.
        bank: Its slots, or none for the bare base.
        pad_id: Id that fills padded batches.
        padded: Use padded batches even where flat ones work.
    """

    def __init__(self, model: PreTrainedModel, bank: Slots | None, pad_id: int, *, padded: bool = False) -> None:
        self.model, self.bank, self.pad_id = model, bank, pad_id
        self.device = next(model.parameters()).device
        with torch.no_grad(), bank.disabled() if bank else nullcontext():
            own = bank is not None and bank.padded_model is not None
            self.flat = not own and not padded and use_flat_attention(model)
            decoder = None if own else plain_decoder(model)
            self.decoder = lean(decoder) if decoder is not None and self.flat else decoder
        self._packed_head: PackedWeight | None = None

    def speed_up(self) -> None:
        """Prepare bank and output head for many steps (see ``Slots.speed_up``)."""
        if self.bank is not None:
            self.bank.speed_up(lambda: self.model(input_ids=few_ids(self.model), use_cache=False))
        head = self.model.get_output_embeddings()
        trains = self.bank is not None and head is not None and head.weight.requires_grad
        if isinstance(head, nn.Linear) and not trains:
            self._packed_head = pack(head.weight)

    def __call__(self, batch: FlatBatch) -> TokenLoss:
        """Loss of a batch; a batch without targets has loss 0."""
        if not len(batch.targets):
            return TokenLoss(torch.zeros((), requires_grad=True), (0.0,) * len(batch.slots))
        total, losses = self.losses(batch)
        sums = losses.detach().split(list(batch.part_targets))
        return TokenLoss(total, tuple(float(part.sum()) for part in sums))

    def losses(self, batch: FlatBatch) -> tuple[Tensor, Tensor]:
        """The weighted sum to differentiate, and each target's loss ``(targets,)``; on the meta device, shapes."""
        targets = batch.targets.to(self.device)
        weights = batch.weights.to(self.device, torch.promote_types(self.model.dtype, torch.float32))
        drops = [slot for slot in batch.slots if self.bank is not None and self.bank.drops(slot)]
        # Under dropout each row has masks of its own, so that it shares nothing, and they go by all tokens of a slot.
        shared = batch.shared_prompts(drops) if self.flat else None
        inputs, positions = self._inputs(batch, shared)
        routing = batch.routing(shared, padded=not self.flat)
        with self._route(routing):
            if self.decoder is None:
                logits = self._model_logits(inputs, positions.to(self.device)).to(weights.dtype)
                losses = F.cross_entropy(logits, targets, reduction="none")
                total = (losses * weights).sum()
            elif isinstance(self.decoder, LeanLayers) and not drops:
                kept, back = positions.unique(return_inverse=True)
                wanted = Wanted(kept.to(self.device), self._route(routing.of(kept)))
                hidden = self.decoder(**inputs, wanted=wanted)[0][0].index_select(0, back.to(self.device))
            else:
                hidden = self.decoder(**inputs)[0].flatten(0, 1).index_select(0, positions.to(self.device))
        if self.decoder is not None:
            total, losses = self._head_loss(hidden, targets, weights, batch)
        return total, losses

    def _inputs(self, batch: FlatBatch, shared: SharedPrompts | None) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the model's forward, and (on the CPU) where in its flattened output targets are predicted."""
        if self.flat:
            ids, places, targets = batch.input_ids, batch.position_ids, batch.positions
            if shared is not None:
                ids, places, targets = ids[shared.kept], places[shared.kept], shared.place[targets]
                shared = shared.to(self.device)
            layout = FlatLayout(batch.lengths, shared)
            return flat_inputs(ids.to(self.device)[None], places.to(self.device)[None], layout), targets
        padded_ids, mask, where = batch.padded(self.pad_id)
        inputs = {"input_ids": padded_ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        return inputs, where

    def _model_logits(self, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        if self.flat and self.bank is None:
            return cast(Tensor, self.model(**inputs, logits_to_keep=positions).logits)[0]
        logits = answering(self.model, self.bank)(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
        return cast(Tensor, logits).flatten(0, 1).index_select(0, positions)

    def _route(self, routing: Routing) -> AbstractContextManager[None]:
        return self.bank.route(routing) if self.bank else nullcontext()

    def _head_loss(self, hidden: Tensor, targets: Tensor, weights: Tensor, batch: FlatBatch) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and not head._forward_hooks:
            both = _HeadLoss.apply(hidden, head.weight, head.bias, targets, weights, self._packed_head)  # type: ignore[no-untyped-call]
            return cast("tuple[Tensor, Tensor]", both)
        # The head has adapters: plain autograd, one slot and chunk at a time, recomputed in the backward pass.
        losses, start = [], 0
        for slot, key, count in batch.by_slot(batch.part_targets):
            for begin in range(start, start + count, CHUNK):
                part = slice(begin, min(begin + CHUNK, start + count))
                routing = Routing((slot,), (part.stop - begin,), dropout_keys=(mix_key(key, begin - start),))
                arguments = (head, hidden[part], targets[part], routing, weights.dtype)
                losses.append(checkpoint(self._adapted_head, *arguments, use_reentrant=False))
            start += count
        together = torch.cat(losses)
        return (together * weights).sum(), together

    def _adapted_head(
        self, head: nn.Module, hidden: Tensor, targets: Tensor, routing: Routing, dtype: torch.dtype
    ) -> Tensor:
        with self._route(routing):
            return F.cross_entropy(head(hidden).to(dtype), targets, reduction="none")


def row_losses(loss_model: LossModel, rows: Sequence[TrainRow], slot: int, batch_size: int) -> list[tuple[float, int]]:
    """Summed cross-entropy in nats, and number of supervised tokens, of every row, without gradients.

    Args:
        loss_model: The base and its bank.
        rows: Rows to measure.
        slot: Slot to measure with; -1 is the bare base.
        batch_size: Rows in a batch.
    """
    return [own for (own,) in family_losses(loss_model, [[row] for row in rows], slot, batch_size)]


def family_losses(
    loss_model: LossModel, families: Sequence[Sequence[TrainRow]], slot: int, batch_size: int
) -> list[list[tuple[float, int]]]:
    """As ``row_losses``, for families of rows that begin alike: flat batches compute their beginning once.

    Args:
        loss_model: The base and its bank.
        families: Rows to measure, those together that have a beginning in common.
        slot: Slot to measure with; -1 is the bare base.
        batch_size: Families in a batch.
    """
    order = sorted(range(len(families)), key=lambda i: len(families[i][0].input_ids))
    found = [[(0.0, 0)] * len(family) for family in families]
    pace = Pace("rows measured", len(order))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([Part(slot, families[i]) for i in chosen])
            places = list(zip(np.repeat(chosen, batch.part_rows).tolist(), batch.order, strict=True))
            counts = [count_targets([families[family][row]]) for family, row in places]
            losses = loss_model.losses(batch)[1] if sum(counts) else batch.weights
            sums = torch.stack([part.sum() for part in losses.split(counts)]).tolist()  # one wait for an accelerator
            for (family, row), total, count in zip(places, sums, counts, strict=True):
                found[family][row] = (total, count)
            pace.add(len(chosen))
    return found


def mean_loss(measured: Sequence[tuple[float, int]]) -> float:
    """Nats per supervised token from each row's sum and count; no number where nothing is supervised."""
    count = sum(n for _, n in measured)
    return math.fsum(loss for loss, _ in measured) / count if count else math.nan
