"""One adapter of a population: its rows, its optimizer, its schedule, its state."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorafleet.config.training import TrainingConfig
from lorafleet.data.batches import Part, Schedule, TrainRow, count_targets
from lorafleet.errors import CheckpointError, TrainingError
from lorafleet.lora import Slots
from lorafleet.lora.layer import mix_key
from lorafleet.training.optimizer import AdamW
from lorafleet.training.schedule import learning_rate

Status = Literal["training", "finished", "pruned", "failed"]


@dataclass
class Progress:
    """What of a member besides its tensors must survive an interruption."""

    step: int = 0
    status: Status = "training"
    loss_sum: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    last_eval_loss: float | None = None
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class Window:
    """The rows of one optimizer step, in micro-batches, ready for the loop."""

    parts: list[Part]
    targets: int
    tokens: int

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the rows come from."""
        return tuple(str(getattr(row, "source", "?")) for part in self.parts for row in part.rows)


class Member:
    """An adapter that trains in a slot of a bank, by itself or beside others.

    Nothing of it depends on its neighbours: order, dropout and start follow from its own seed and step, its gradient
    and optimizer state are its own.

    Args:
        name: Its name in messages, logs and checkpoints.
        bank: The bank that holds its adapter.
        slot: Its slot.
        config: Its training knobs.
        rows: Its training rows.
        eval_rows: Its held-out rows; may be empty.
        eval_at: Steps after which it is evaluated; as the population's validation says where None.
    """

    def __init__(
        self,
        name: str,
        bank: Slots,
        slot: int,
        config: TrainingConfig,
        rows: Sequence[TrainRow],
        eval_rows: Sequence[TrainRow] = (),
        eval_at: Collection[int] | None = None,
    ) -> None:
        self.name, self.bank, self.slot, self.config = name, bank, slot, config
        self.rows, self.eval_rows, self.eval_at = rows, eval_rows, eval_at
        self.schedule = Schedule(
            len(rows), config.per_device_train_batch_size, config.gradient_accumulation_steps, config.seed
        )
        self.total_steps = self.schedule.total_steps(config.num_train_epochs, config.max_steps)
        self.progress = Progress()
        self.parameters = bank.slot_parameters(slot)
        self.views = [parameter.value for parameter in self.parameters.values()]
        # One optimizer an adapter, over views of the stacked tensors: nothing that a neighbour could leak into.
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A; as in PEFT, so does what is no matrix. An
        # embedding's B does not: of its two it is A that starts at zero.
        fast = [name.endswith("lora_B") or one.value.ndim == 1 for name, one in self.parameters.items()]
        self.optimizer = AdamW(self.views, config, [config.loraplus_lr_ratio if one else 1.0 for one in fast])
        self.best: list[Tensor] | None = None

    def check_bound(self) -> None:
        """Make sure that the bank still holds the tensors that this member trains.

        Raises:
            TrainingError: A layer has grown meanwhile and holds others.
        """
        now = self.bank.slot_parameters(self.slot)
        moved = [name for name, one in self.parameters.items() if now[name].parameter is not one.parameter]
        if moved:
            raise TrainingError(
                f"{self.name}: {', '.join(moved[:3])} grew while it was training, for an adapter of a larger rank; "
                "reserve room for all adapters of a population before it starts (bank.reserve)"
            )

    # -- a step ---------------------------------------------------------------------------------------------------

    def window(self) -> Window:
        """The rows of the next step; every target weighs one over the targets of the whole window."""
        step = self.progress.step
        batches = [[self.rows[i] for i in batch] for batch in self.schedule.window(step)]
        targets = sum(count_targets(batch) for batch in batches)
        parts = [
            Part(self.slot, batch, 1 / max(1, targets), mix_key(mix_key(self.config.seed, step), micro))
            for micro, batch in enumerate(batches)
        ]
        return Window(parts, targets, sum(len(row.input_ids) for batch in batches for row in batch))

    def update(self) -> float:
        """Take one optimizer step with the clipped gradient; return its learning rate."""
        rate = learning_rate(self.config, self.progress.step, self.total_steps)
        # What no row of the step went through has no gradient by itself; beside a neighbour it would be zeros.
        grads = [
            torch.zeros_like(view) if (grad := parameter.grad) is None else grad
            for view, parameter in zip(self.views, self.parameters.values(), strict=True)
        ]
        self.optimizer.step(grads, rate)
        self.progress.step += 1
        return rate

    def is_due(self, strategy: Literal["no", "steps", "epoch"], every: int) -> bool:
        """Whether something that is done ``every`` steps or once an epoch is due now; after the last step it is."""
        if strategy == "no":
            return False
        period = every if strategy == "steps" else self.schedule.steps_per_epoch
        return self.progress.step % period == 0 or self.progress.step == self.total_steps

    @property
    def active(self) -> bool:
        """Whether it still trains."""
        return self.progress.status == "training"

    @property
    def epoch(self) -> float:
        """Passes over its rows so far."""
        return self.progress.step / self.schedule.steps_per_epoch

    @property
    def train_loss(self) -> float:
        """Mean loss over all steps so far."""
        return self.progress.loss_sum / self.progress.step if self.progress.step else math.nan

    # -- the best so far ------------------------------------------------------------------------------------------

    def note_evaluation(self, eval_loss: float) -> bool:
        """Record an evaluation; remember the adapter if its loss is the lowest so far. Returns whether it is."""
        progress = self.progress
        progress.last_eval_loss = eval_loss
        better = progress.best_loss is None or eval_loss < progress.best_loss
        if better:
            progress.best_loss, progress.best_step, progress.evaluations_without_gain = eval_loss, progress.step, 0
            self.best = [view.clone() for view in self.views]
        else:
            progress.evaluations_without_gain += 1
        return better

    def restore_best(self) -> bool:
        """Put the adapter of the lowest evaluation loss back; return whether that changed anything."""
        if self.best is None or self.progress.best_step == self.progress.step:
            return False
        for view, value in zip(self.views, self.best, strict=True):
            view.copy_(value)
        return True

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer moments and the best weights so far, by stable names."""
        found: dict[str, Tensor] = {}
        for number, (name, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            found[f"{self.name}/value/{name}"] = view
            found[f"{self.name}/exp_avg/{name}"] = self.optimizer.exp_avg[number]
            found[f"{self.name}/exp_avg_sq/{name}"] = self.optimizer.exp_avg_sq[number]
            if self.best is not None:
                found[f"{self.name}/best/{name}"] = self.best[number]
        return found

    def load(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Continue from a checkpoint's tensors and progress.

        Raises:
            CheckpointError: Tensors are missing.
        """
        self.progress = Progress(**progress)
        missing = [name for name in self.parameters if f"{self.name}/value/{name}" not in tensors]
        if missing:
            raise CheckpointError(f"the checkpoint has no tensors for {', '.join(missing)} of adapter {self.name!r}")
        self.optimizer.steps.fill_(self.progress.step)
        moments = (("exp_avg", self.optimizer.exp_avg), ("exp_avg_sq", self.optimizer.exp_avg_sq))
        for kind, places in (("value", self.views), *moments):
            for name, place in zip(self.parameters, places, strict=True):
                place.copy_(tensors[f"{self.name}/{kind}/{name}"])
        if self.progress.best_loss is not None:
            self.best = [
                tensors[f"{self.name}/best/{name}"].to(v.device)
                for name, v in zip(self.parameters, self.views, strict=True)
            ]


def clip_gradients(members: Sequence[Member]) -> list[float]:
    """Scale each adapter's gradient down to its own ``max_grad_norm``, in place; return the norms before.

    A stacked gradient is read once for all adapters: one by one, their many small norms took longer than their rows.
    """
    stacked, whole = dict[int, Tensor](), [list[Tensor]() for _ in members]
    for member, own in zip(members, whole, strict=True):
        for parameter, part in member.parameters.values():
            if parameter.grad is not None and part is not None:
                stacked[id(parameter)] = parameter.grad
            elif parameter.grad is not None:
                own.append(parameter.grad)
    norms = [
        [one.views[0].new_zeros(()), *map(torch.linalg.vector_norm, own)]
        for one, own in zip(members, whole, strict=True)
    ]
    if stacked:
        rows = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in stacked.values()])
        by_slot = torch.linalg.vector_norm(rows, dim=0).unbind()
        for member, parts in zip(members, norms, strict=True):
            parts.append(by_slot[member.slot])
    totals: list[float] = torch.stack([torch.linalg.vector_norm(torch.stack(parts)) for parts in norms]).tolist()
    factors = [_clip_factor(member.config.max_grad_norm, total) for member, total in zip(members, totals, strict=True)]
    for own, factor in zip(whole, factors, strict=True):
        for grad in own:
            grad.mul_(factor)
    if min(factors) < 1:
        for grad in stacked.values():
            by_row = grad.new_ones(grad.shape[0])
            by_row[[member.slot for member in members]] = grad.new_tensor(factors)
            grad.mul_(by_row.view(-1, *[1] * (grad.ndim - 1)))
    return totals


def _clip_factor(limit: float, norm: float) -> float:
    """As PyTorch's ``clip_grad_norm_``; 1 where nothing is to be clipped, or nothing can be."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 and math.isfinite(norm) else 1.0
