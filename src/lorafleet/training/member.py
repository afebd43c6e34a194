"""One adapter of a population: its rows, its optimizer, its schedule, its state."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lorafleet.config.training import TrainingConfig
from lorafleet.data.batches import Part, Schedule, TrainRow, count_targets
from lorafleet.errors import CheckpointError, TrainingError
from lorafleet.lora import LoraBank
from lorafleet.lora.layer import mix_key
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
        bank: LoraBank,
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
        # One optimizer an adapter, over views of the stacked tensors: the library's own fused AdamW, and nothing that
        # a neighbour could leak into. The zero padding of smaller ranks gets zero gradients and stays zero.
        self.optimizer = torch.optim.AdamW(
            self.views,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
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

    def clip(self) -> float:
        """Scale the gradient down to ``max_grad_norm``; return its norm before. Needs gradients in place."""
        grads = []
        for view, parameter in zip(self.views, self.parameters.values(), strict=True):
            # No gradient at all means none of this step's tokens reached it; beside a neighbour it would be zeros.
            view.grad = parameter.grad if parameter.grad is not None else torch.zeros_like(view)
            grads.append(view.grad)
        norm = get_total_norm(grads)
        if self.config.max_grad_norm > 0 and bool(torch.isfinite(norm)):
            clip_grads_with_norm_(self.views, self.config.max_grad_norm, norm)
        return float(norm)

    def update(self) -> float:
        """Take one optimizer step with the clipped gradient; return its learning rate."""
        rate = learning_rate(self.config, self.progress.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
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
            state = self.optimizer.state.get(view, {})
            found[f"{self.name}/value/{name}"] = view
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    found[f"{self.name}/{moment}/{name}"] = state[moment]
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
        stepped = f"{self.name}/exp_avg/{next(iter(self.parameters))}" in tensors
        for name, view in zip(self.parameters, self.views, strict=True):
            view.copy_(tensors[f"{self.name}/value/{name}"])
            if stepped:
                self.optimizer.state[view] = {
                    "step": torch.tensor(float(self.progress.step), dtype=torch.float32, device=view.device),
                    "exp_avg": tensors[f"{self.name}/exp_avg/{name}"].to(view.device),
                    "exp_avg_sq": tensors[f"{self.name}/exp_avg_sq/{name}"].to(view.device),
                }
        if self.progress.best_loss is not None:
            self.best = [
                tensors[f"{self.name}/best/{name}"].to(v.device)
                for name, v in zip(self.parameters, self.views, strict=True)
            ]
