"""Each method's own learning rate, by short runs from the same start."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.data.store import TokenRow
from lorafleet.errors import TrainingError
from lorafleet.evaluation.token_loss import LossModel, mean_loss, row_losses
from lorafleet.lora import Slots
from lorafleet.models.load import Base
from lorafleet.training.loop import Population
from lorafleet.training.member import Member

logger = logging.getLogger(__name__)

FACTOR = math.sqrt(10)
"""Between one rate and the next."""

MORE = 4
"""Rates beyond the first ones: a hundredth or a hundred times of what was given."""


def find_rate(
    base: Base,
    slots: Slots,
    training: TrainingConfig,
    rows: Sequence[TokenRow],
    held_out: Sequence[TokenRow],
    run: RunConfig,
    steps: int,
    count: int,
) -> dict[str, Any]:
    """Train a little at several rates around the given one; the lowest held-out loss wins.

    As long as the best is the lowest or highest that was tried, one more is tried beyond it, :data:`MORE` at most.

    Args:
        base: The base.
        slots: The method on it; its slot 0 ends where the last run has left it.
        training: The method's knobs; their learning rate is the middle one.
        rows: Rows to train on.
        held_out: Rows to compare by.
        run: Batch size of evaluation.
        steps: Steps of each run; the schedule ends with them.
        count: Rates to begin with.

    Returns:
        ``rate``, ``steps``, ``at_end``: whether a better one may lie beyond those that were tried; and ``runs`` with
        rate and held-out loss of each; a loss that is no number is null.

    Raises:
        TrainingError: The loss was NaN or infinite at every rate.
    """
    start = {name: one.value.clone() for name, one in slots.slot_parameters(0).items()}
    loss_model = LossModel(base.model, slots, base.tokenizer.pad_token_id)
    loss_model.speed_up()

    def loss_at(rate: float) -> float:
        for name, one in slots.slot_parameters(0).items():
            one.value.copy_(start[name])
        own = training.model_copy(update={"learning_rate": rate, "max_steps": steps})
        if train_briefly(loss_model, slots, own, rows, run).progress.status == "failed":
            return math.inf
        loss = mean_loss(row_losses(loss_model, held_out, 0, run.per_device_eval_batch_size))
        logger.info("learning rate %.1e: held-out loss %.4f after %d steps", rate, loss, steps)
        return loss if math.isfinite(loss) else math.inf

    first = training.learning_rate / FACTOR ** ((count - 1) / 2)
    losses = {rate: loss_at(rate) for rate in (first * FACTOR**i for i in range(count))}
    while (beyond := _beyond(losses)) and len(losses) < count + MORE:
        losses[beyond] = loss_at(beyond)
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf:
        raise TrainingError(f"the loss was no number at any learning rate from {min(losses):.1e} to {max(losses):.1e}")
    runs = [{"rate": r, "loss": loss if loss < math.inf else None} for r, loss in sorted(losses.items())]
    return {"rate": best, "steps": steps, "at_end": _beyond(losses) is not None, "runs": runs}


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The next rate beyond the best one; none where the best has worse ones on both sides."""
    best = min(losses, key=losses.__getitem__)
    if best == min(losses):
        return best / FACTOR
    return best * FACTOR if best == max(losses) else None


def train_briefly(
    loss_model: LossModel, slots: Slots, training: TrainingConfig, rows: Sequence[TokenRow], run: RunConfig
) -> Member:
    """Train slot 0 without files."""
    member = Member(f"learning rate {training.learning_rate:.1e}", slots, 0, training, rows)
    Population([member], loss_model, slots, run.model_copy(update={"save_strategy": "no"})).train()
    slots.eval()
    return member
