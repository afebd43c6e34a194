"""How many adapters share a pass: as many as fit, by measuring one and two of them, and on a CPU no more than pay."""

import gc
import logging
import math
import sys
from collections.abc import Sequence
from functools import partial

import torch

from lorafleet.config.lora import LoraConfig
from lorafleet.data.batches import Part, TrainRow, collate
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import LoraBank
from lorafleet.lora.layer import linear_shape
from lorafleet.lora.targets import pattern_value
from lorafleet.models.machine import free_memory_bytes, memory_of

logger = logging.getLogger(__name__)

TENSORS_PER_SLOT = 5
"""Copies of an adapter that training holds: weights, gradients, two moments, and the best so far."""

TOKENS_OF_A_PASS = 1024
"""Rows at which a CPU's products have their full rate. Further ones only hold, and first touch, more memory."""


def adapters_of_a_pass(tokens: float, device: torch.device) -> int | None:
    """How many adapters fill a pass when each brings ``tokens`` to it; none where only memory sets a limit."""
    return math.ceil(TOKENS_OF_A_PASS / tokens) if device.type == "cpu" else None


def adapters_that_fit(
    loss_model: LossModel,
    rows: Sequence[TrainRow],
    slots: Sequence[int],
    slot_bytes: int,
    share: float,
    wanted: int,
    tokens: float,
) -> tuple[int, int]:
    """Measure how many adapters can train side by side within a part of the free memory.

    One pass forward and backward is run with one adapter's micro-batch, one with two; what the second needs more is
    what each further adapter will need. On a CPU a pass that is large enough takes no more adapters; where memory has
    room for that many first ones, the second pass is left out.

    Args:
        loss_model: The base and its bank. Gradients that are in the bank are cleared.
        rows: The largest micro-batch of an adapter.
        slots: Two slots to run it with.
        slot_bytes: Bytes of one adapter's weights.
        share: Part of the free memory that the population may take.
        wanted: Adapters that are to have a slot, if need be at the price of several passes in each step.
        tokens: What an adapter brings to a pass, in the mean.

    Returns:
        How many adapters: those of one pass, or more, up to what is wanted; and how many of them share a pass. 1 at
        least; 1 too where this system does not tell the memory of a pass.
    """
    gc.collect()  # or a pass would use what earlier work left
    budget = share * free_memory_bytes(loss_model.device)
    one = memory_of(partial(_pass, loss_model, rows, slots[:1]), loss_model.device)
    if one is None:
        logger.info(
            "this system does not tell the memory of a pass, so adapters train one after the other; "
            "population_size sets how many train together"
        )
        return 1, 1
    free, enough = budget - one, adapters_of_a_pass(tokens, loss_model.device) or sys.maxsize
    # No further adapter needs more than the first, whose pass holds what all of them share, too.
    found = _divided(free, one, TENSORS_PER_SLOT * slot_bytes, wanted, enough)
    if found[1] == enough:
        return found
    two = memory_of(partial(_pass, loss_model, rows, slots[:2]), loss_model.device)
    further = one if two is None else max(0, two - one)
    return _divided(free, further, TENSORS_PER_SLOT * slot_bytes, wanted, enough)


def _divided(free: float, further: int, kept: int, wanted: int, enough: int) -> tuple[int, int]:
    """How many adapters, and how many of them share a pass, if in it each but the first needs ``further`` bytes."""
    in_one_pass = max(1, min(enough, 1 + int((free - kept) // (further + kept))))
    adapters = min(wanted, int(free // kept))
    if adapters <= in_one_pass:
        return in_one_pass, in_one_pass
    room = 1 + int((free - adapters * kept) // further) if further else adapters
    return adapters, min(enough, room)


def measured_capacity(
    loss_model: LossModel,
    bank: LoraBank,
    shapes: Sequence[LoraConfig],
    rows: Sequence[TrainRow],
    share: float,
    wanted: int,
    tokens: float,
) -> tuple[int, int]:
    """:func:`adapters_that_fit` for adapters of the largest of these shapes.

    Args:
        loss_model: The base and its bank.
        bank: The bank, with two empty slots and room reserved for the shapes.
        shapes: What the adapters look like.
        rows: The largest micro-batch of an adapter.
        share: Part of the free memory that the population may take.
        wanted: Adapters that are to have a slot.
        tokens: What an adapter brings to a pass, in the mean.
    """
    largest = max(shapes, key=lambda lora: _numbers(bank, lora))
    slots = [bank.add(largest, slot=slot) for slot in range(2)]
    bank.train()
    slot_bytes = sum(one.value.nbytes for one in bank.slot_parameters(0).values())
    found = adapters_that_fit(loss_model, rows, slots, slot_bytes, share, wanted, tokens)
    for slot in slots:
        bank.remove(slot)
    return found


def _numbers(bank: LoraBank, lora: LoraConfig) -> int:
    """How many an adapter of this shape has."""
    plain = lora.as_plain()
    return sum(
        int(pattern_value(plain.rank_pattern, path, plain.r)) * sum(linear_shape(layer))
        for path, layer in bank.find_targets(lora).items()
    )


def _pass(loss_model: LossModel, rows: Sequence[TrainRow], slots: Sequence[int]) -> None:
    loss_model(collate([Part(slot, rows) for slot in slots])).total.backward()
    if loss_model.bank is not None:
        loss_model.bank.clear_gradients()
