"""What a training run tells the outside: one event type for each thing that happens."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepDone:
    """An optimizer step was taken.

    Args:
        name: The adapter.
        step: Steps taken so far.
        total_steps: Steps of its whole run.
        epoch: Passes over its rows so far.
        loss: Mean over the supervised tokens of the step, in nats.
        learning_rate: Rate of the step.
        grad_norm: Norm of the gradient before clipping.
        tokens: Tokens processed in the step.
        trained_tokens: Tokens among them that were targets.
        seconds: Wall time of the step, shared by all adapters of the population.
    """

    name: str
    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """Held-out rows were measured; ``best`` says whether the loss is the lowest so far."""

    name: str
    step: int
    eval_loss: float
    best: bool


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Failed:
    """An adapter's loss or gradient is not finite; its weights are those before the step."""

    name: str
    step: int
    reason: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """An adapter has ended: all steps done, or no improvement any more."""

    name: str
    step: int
    reason: str


@dataclass(frozen=True)
class Pruned:
    """An adapter was stopped early because others of its search did better at the same point."""

    name: str
    step: int


Event = StepDone | Evaluated | Saved | Failed | Finished | Pruned
Observer = Callable[[Event], None]
