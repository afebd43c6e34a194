"""The training loop: a population of adapters on one frozen base. ``train`` is a population of one."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest

from lorafleet.config.training import RunConfig, ValidationConfig
from lorafleet.data.batches import collate
from lorafleet.errors import Interrupted, TrainingError
from lorafleet.evaluation.token_loss import LossModel, mean_loss, row_losses
from lorafleet.lora import Slots
from lorafleet.models.machine import is_out_of_memory
from lorafleet.training.events import Evaluated, Event, Failed, Finished, Observer, Pruned, StepDone
from lorafleet.training.member import Member, Window, clip_gradients
from lorafleet.training.queue import AdapterQueue

logger = logging.getLogger(__name__)

NO_VALIDATION = ValidationConfig(eval_strategy="no")


class Population:
    """Adapters that train together; each ends as if it had trained alone.

    Args:
        members: The adapters, each in a slot of its own.
        loss_model: The base and its bank.
        bank: The bank.
        run: How many rows to evaluate at a time, and when to save.
        validation: When those members are evaluated that have no steps of their own for it, and when they stop early.
        queue: Lets further adapters in, and takes those out that have ended.
        together: Adapters in one forward pass, at most; all where None. Halved when memory does not suffice.
        steps: Steps taken before, by the checkpoint that is gone on from.
        observers: Called with every event, in order.
        save: Writes a checkpoint.
        stop_requested: Asked after every step; true saves a checkpoint and ends the run.
    """

    def __init__(
        self,
        members: Sequence[Member],
        loss_model: LossModel,
        bank: Slots,
        run: RunConfig,
        *,
        validation: ValidationConfig = NO_VALIDATION,
        queue: AdapterQueue | None = None,
        together: int | None = None,
        steps: int = 0,
        observers: Sequence[Observer] = (),
        save: Callable[[], None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.members, self.loss_model, self.bank, self.run = list(members), loss_model, bank, run
        self.validation, self.queue, self.together, self.steps = validation, queue, together, steps
        self.observers, self.save, self.stop_requested = observers, save, stop_requested

    def train(self) -> None:
        """Run until every member has ended and nobody joins.

        Raises:
            Interrupted: A stop was requested; a checkpoint holds the state.
            TrainingError: One adapter by itself does not fit into memory.
        """
        self.bank.train()
        while self._gather():
            self._round(self.members)
        self.bank.eval()

    def _gather(self) -> bool:
        """Keep those who still train, let others join, and tell whether anybody trains."""
        self.members = [member for member in self.members if member.active]
        joined = self.queue.admit() if self.queue else []
        if joined:
            for member in self.members:
                member.check_bound()
        self.members += joined
        return bool(self.members)

    def _round(self, active: Sequence[Member]) -> None:
        """A step of everybody and what is due after it; it holds none of them when others join, nor their memory."""
        self._step(active)
        self.steps += 1
        self._evaluate(active)
        for member in active:
            self._end_if_done(member)
        due = any(member.is_due(self.run.save_strategy, self.run.save_steps) for member in active)
        if self.queue and (ended := [member for member in active if not member.active]):
            self.bank.eval()  # they are measured as they will be used, without dropout
            self.queue.dismiss(ended)
            self.bank.train()
        if self.stop_requested():
            self._checkpoint()
            raise Interrupted(f"stopped at step {self.steps}")
        if due:
            self._checkpoint()

    def _step(self, active: Sequence[Member]) -> None:
        """One optimizer step of every active member; their micro-batches share forward and backward passes."""
        start = time.perf_counter()
        windows = [member.window() for member in active]
        losses = self._losses(active, windows)
        norms = clip_gradients(active)
        outcomes = zip(active, windows, losses, norms, strict=True)
        rates = [self._update(member, window, loss, norm) for member, window, loss, norm in outcomes]
        self.bank.clear_gradients()
        seconds = time.perf_counter() - start
        for member, window, total, norm, rate in zip(active, windows, losses, norms, rates, strict=True):
            if rate is not None:
                self._note_step(member, window, total / max(1, window.targets), norm, rate, seconds)

    def _losses(self, active: Sequence[Member], windows: Sequence[Window]) -> list[float]:
        """Each member's summed loss over its window, with the gradients left in place."""
        losses = [0.0] * len(active)
        try:
            for parts in zip_longest(*(window.parts for window in windows)):
                present = [number for number, part in enumerate(parts) if part is not None]
                for numbers in self._passes(active, present):
                    loss = self.loss_model(collate([parts[number] for number in numbers]))
                    loss.total.backward()
                    for number, part_loss in zip(numbers, loss.parts, strict=True):
                        losses[number] += part_loss
            return losses
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            shared = min(self.together or len(active), len(active))
            if shared == 1:
                raise TrainingError(
                    f"one adapter's micro-batch does not fit into memory ({error}); lower per_device_train_batch_size "
                    "and raise gradient_accumulation_steps, or turn gradient_checkpointing on"
                ) from error
            self.together, loss = shared // 2, None  # with its graph, whose memory the next attempt needs
        logger.warning("out of memory: at most %d adapters share a pass from now on", self.together)
        self.bank.clear_gradients()
        return self._losses(active, windows)

    def _passes(self, active: Sequence[Member], present: list[int]) -> list[list[int]]:
        """Which members share a forward pass: all that fit, unless dropout masks cover padding of the longest row."""
        dropout = any(self.bank.drops(active[number].slot) for number in present)
        most = 1 if dropout and not self.loss_model.flat else self.together or len(present)
        size = math.ceil(len(present) / math.ceil(len(present) / most))  # as equal as can be
        return [present[start : start + size] for start in range(0, len(present), size)]

    def _update(self, member: Member, window: Window, loss: float, norm: float) -> float | None:
        """Step one member, or stop it alone when its loss or gradient is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return member.update()
        member.progress.status = "failed"
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        self._tell(Failed(member.name, member.progress.step + 1, what, window.sources))
        return None

    def _note_step(self, member: Member, window: Window, loss: float, norm: float, rate: float, seconds: float) -> None:
        progress = member.progress
        progress.loss_sum += loss
        progress.tokens += window.tokens
        progress.trained_tokens += window.targets
        progress.seconds += seconds
        self._tell(
            StepDone(
                member.name,
                progress.step,
                member.total_steps,
                member.epoch,
                loss,
                rate,
                norm,
                window.tokens,
                window.targets,
                seconds,
            )
        )

    def _evaluates(self, member: Member) -> bool:
        if member.eval_at is not None:
            return member.progress.step in member.eval_at
        return member.is_due(self.validation.eval_strategy, self.validation.eval_steps)

    def _evaluate(self, active: Sequence[Member]) -> None:
        due = [member for member in active if member.active and member.eval_rows and self._evaluates(member)]
        if not due:
            return
        self.bank.eval()
        for member in due:
            size = self.run.per_device_eval_batch_size
            eval_loss = mean_loss(row_losses(self.loss_model, member.eval_rows, member.slot, size))
            best = member.note_evaluation(eval_loss)
            self._tell(Evaluated(member.name, member.progress.step, eval_loss, best))
        if self.queue:
            self.queue.judge(due)
        for member in due:
            if member.progress.status == "pruned":
                self._tell(Pruned(member.name, member.progress.step))
        self.bank.train()

    def _end_if_done(self, member: Member) -> None:
        progress, patience = member.progress, self.validation.early_stopping_patience
        reason = None
        if progress.step >= member.total_steps:
            reason = "all steps done"
        elif patience is not None and progress.evaluations_without_gain >= patience:
            reason = f"no lower loss in {patience} evaluations"
        if reason and member.active:
            progress.status = "finished"
            self._tell(Finished(member.name, progress.step, reason))

    def _checkpoint(self) -> None:
        if self.save is not None:
            self.save()

    def _tell(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)
