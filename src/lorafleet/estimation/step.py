"""What one micro-batch takes, found out by running it on the meta device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.data.batches import Part, TrainRow, collate
from lorafleet.estimation.ledger import Ledger, NoValues, Product
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import LoraBank, Slots


@dataclass(frozen=True)
class StepCost:
    """A forward and a backward pass.

    Attributes:
        tokens: Tokens of the micro-batch.
        kept_bytes: What the backward pass needs of the forward pass.
        peak_bytes: Most that was held beside the weights, gradients included.
        logits_bytes: How many of those were logits.
        flops: Operations of matrix products and attention.
        products: How many of them each shape of product has.
        traffic: Bytes read and written by everything else.
        calls: Kernels called.
    """

    tokens: int
    kept_bytes: int
    peak_bytes: int
    logits_bytes: int
    flops: float
    products: Mapping[Product, float]
    traffic: float
    calls: int

    def scaled(self, share: float) -> Self:
        """With this share of the work, in as many calls."""
        products = {shape: share * flops for shape, flops in self.products.items()}
        return replace(self, flops=share * self.flops, traffic=share * self.traffic, products=products)


def step_cost(model: PreTrainedModel, slots: Slots, rows: Sequence[TrainRow], *, again: bool = False) -> StepCost:
    """Run a micro-batch of slot 0 without values.

    Args:
        model: On the meta device.
        slots: A method on it.
        rows: The micro-batch.
        again: Whether it follows another of the same step, whose gradients are there already.
    """
    with NoValues():
        loss_model = LossModel(model, slots, pad_id=0)
        if loss_model.decoder is not None and _changes_logits(model):
            loss_model.decoder = None
        loss_model.speed_up()
    slots.train()
    batch = collate([Part(0, rows)])
    weights = [*model.parameters(), *model.buffers(), *(one.parameter for one in slots.slot_parameters(0).values())]
    held = 0
    if again:
        for one in {id(one.parameter): one.parameter for one in slots.slot_parameters(0).values()}.values():
            one.grad = torch.empty_like(one)
            weights.append(one.grad)
            held += one.grad.nbytes
    head, layers = laid_out_weights(model, slots)
    with NoValues(), Ledger(weights, model.config.get_text_config().vocab_size, [*head, *layers]) as ledger:
        total, _ = loss_model.losses(batch)
        kept = ledger.live
        total.backward()
    slots.clear_gradients()
    return StepCost(
        tokens=batch.tokens,
        kept_bytes=kept,
        peak_bytes=ledger.peak + held,
        logits_bytes=ledger.logits_at_peak,
        flops=ledger.flops,
        products=ledger.products,
        traffic=ledger.traffic,
        calls=ledger.calls,
    )


def laid_out_weights(model: PreTrainedModel, slots: Slots) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that a CPU lays out for their products: the head's, if it is frozen, and LoRA's layers'."""
    head = model.get_output_embeddings()
    frozen = isinstance(head, nn.Linear) and not head.weight.requires_grad
    layers = slots.layers.values() if isinstance(slots, LoraBank) else ()
    return [head.weight] if frozen else [], [layer.weight for layer in layers if not layer.embeds]


def _changes_logits(model: PreTrainedModel) -> bool:
    """Whether a model does more than its head: scales its logits, or caps them. Values would tell; here kernels do."""
    ids, head = torch.arange(5, device=model.device)[None], model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    with torch.no_grad(), Ledger([*model.parameters()], vocabulary) as plain:
        head(model.base_model(input_ids=ids, use_cache=False)[0])
    with torch.no_grad(), Ledger([*model.parameters()], vocabulary) as whole:
        model(input_ids=ids, use_cache=False)
    return bool(plain.calls != whole.calls)
