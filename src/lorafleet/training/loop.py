"""The training loop: a population of adapters on one frozen base. ``train`` is a population of one."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest

from lorafleet.config.training import RunConfig
from lorafleet.data.batches import collate
from lorafleet.errors import Interrupted
from lorafleet.evaluation.token_loss import LossModel, mean_losses
from lorafleet.lora import LoraBank
from lorafleet.training.events import Evaluated, Event, Failed, Finished, Observer, StepDone
from lorafleet.training.member import Member, Window


class Population:
    """Adapters that train together; each ends as if it had trained alone.

    Args:
        members: The adapters, each in a slot of its own.
        loss_model: The base and its bank.
        bank: The bank.
        run: When to evaluate, save and stop.
        observers: Called with every event, in order.
        save: Writes a checkpoint.
        stop_requested: Asked after every step; true saves a checkpoint and ends the run.
    """

    def __init__(
        self,
        members: Sequence[Member],
        loss_model: LossModel,
        bank: LoraBank,
        run: RunConfig,
        *,
        observers: Sequence[Observer] = (),
        save: Callable[[], None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.members, self.loss_model, self.bank, self.run = list(members), loss_model, bank, run
        self.observers, self.save, self.stop_requested = observers, save, stop_requested
        self.steps = max((m.progress.step for m in self.members), default=0)

    def train(self) -> None:
        """Run until every member has finished or failed.

        Raises:
            Interrupted: A stop was requested; a checkpoint holds the state.
        """
        self.bank.train()
        while active := [m for m in self.members if m.active]:
            self._step(active)
            self.steps += 1
            self._evaluate(
                [m for m in active if m.active and self._due(self.run.eval_strategy, self.run.eval_steps, m)]
            )
            for member in active:
                self._end_if_done(member)
            if self.stop_requested():
                self._checkpoint()
                raise Interrupted(f"stopped at step {self.steps}")
            if any(self._due(self.run.save_strategy, self.run.save_steps, m) for m in active):
                self._checkpoint()
        self.bank.eval()

    def _step(self, active: Sequence[Member]) -> None:
        """One optimizer step of every active member; their micro-batches share forward and backward passes."""
        start = time.perf_counter()
        windows = [member.window() for member in active]
        losses = [0.0] * len(active)
        for parts in zip_longest(*(window.parts for window in windows)):
            present = [number for number, part in enumerate(parts) if part is not None]
            for numbers in self._passes(active, present):
                loss = self.loss_model(collate([parts[number] for number in numbers]))
                loss.total.backward()
                for number, part_loss in zip(numbers, loss.parts, strict=True):
                    losses[number] += part_loss
        norms = [member.clip() for member in active]
        outcomes = zip(active, windows, losses, norms, strict=True)
        rates = [self._update(member, window, loss, norm) for member, window, loss, norm in outcomes]
        self.bank.clear_gradients()
        seconds = time.perf_counter() - start
        for member, window, total, norm, rate in zip(active, windows, losses, norms, rates, strict=True):
            if rate is not None:
                self._note_step(member, window, total / max(1, window.targets), norm, rate, seconds)

    def _passes(self, active: Sequence[Member], present: list[int]) -> list[list[int]]:
        """Which members share a forward pass: all, unless dropout masks cover padding, sized by the longest row."""
        dropout = any(self.bank.drops(active[number].slot) for number in present)
        return [present] if self.loss_model.flat or not dropout else [[number] for number in present]

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

    def _due(self, strategy: str, every: int, member: Member) -> bool:
        """Whether something done by steps or epochs is due for a member; the last step always is."""
        if strategy == "no":
            return False
        period = every if strategy == "steps" else member.schedule.steps_per_epoch
        return member.progress.step % period == 0 or member.progress.step == member.total_steps

    def _evaluate(self, due: Sequence[Member]) -> None:
        due = [member for member in due if member.eval_rows]
        if not due:
            return
        self.bank.eval()
        for member in due:
            size = self.run.per_device_eval_batch_size
            ((eval_loss, _),) = mean_losses(self.loss_model, member.eval_rows, [member.slot], size)
            best = member.note_evaluation(eval_loss)
            self._tell(Evaluated(member.name, member.progress.step, eval_loss, best))
        self.bank.train()

    def _end_if_done(self, member: Member) -> None:
        progress, patience = member.progress, self.run.early_stopping_patience
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
