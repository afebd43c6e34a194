"""What the training loop, evaluation and generation ask of whatever is trained on a model: an adapter, or all of it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lorafleet.errors import AdapterError, RoutingError, did_you_mean, raise_all
from lorafleet.lora.routing import BASE_ONLY, Routing


class SlotParameter(NamedTuple):
    """The part of a parameter that belongs to one slot; ``part`` is none where the whole parameter does."""

    parameter: nn.Parameter
    part: tuple[int, slice] | tuple[int] | None

    @property
    def value(self) -> Tensor:
        """The slot's values, a view."""
        data = self.parameter.detach()  # unlike .data it tells the parameter that it was changed
        return data if self.part is None else data[self.part]

    @property
    def grad(self) -> Tensor | None:
        """The slot's gradient, a view; none before the first backward pass."""
        grad = self.parameter.grad
        return grad if grad is None or self.part is None else grad[self.part]


class Slots(Protocol):
    """Slots of one model and what each of them trains. :class:`LoraBank` is one; so is every other method."""

    @property
    def padded_model(self) -> nn.Module | None:
        """What to call in the model's place, with padded ids and their mask; the last logits are those of the ids.

        None where the model itself answers.
        """

    def virtual_cache(self, rows: int) -> Any:
        """Keys and values of what stands before every row, by the routing in force, as a cache of transformers.

        None where nothing does.
        """

    @property
    def mixes_slots(self) -> bool:
        """Whether rows of several slots, or of a slot and the base, can stand in one batch."""

    def slot_parameters(self, slot: int) -> dict[str, SlotParameter]:
        """What training may change for this slot, by a stable name."""

    def state_dict(self, slot: int) -> dict[str, Tensor]:
        """Copies of what has to be kept of this slot."""

    def load_state_dict(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill the slot with what ``state_dict`` gave."""

    def clear_gradients(self) -> None:
        """Forget the gradients of all slots."""

    def route(self, routing: Routing) -> AbstractContextManager[None]:
        """Put a routing in force within a ``with`` block."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within a ``with`` block the model answers as the bare base."""

    def train(self) -> None:
        """Turn dropout on."""

    def eval(self) -> None:
        """Turn dropout off."""

    def drops(self, slot: int) -> bool:
        """Whether the slot drops anything now."""

    def speed_up(self, run: Callable[[], object], *, training: bool = True) -> None:
        """Prepare for many steps; ``run`` runs the model once on a few tokens."""


def shape_faults(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, surplus or of the wrong shape, with the nearest name for a surplus one."""
    faults = [f"missing {name} {tuple(tensor.shape)}" for name, tensor in wanted.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            faults.append(f"surplus {name} {tuple(tensor.shape)}{did_you_mean(name, wanted)}")
        elif tensor.shape != wanted[name].shape:
            faults.append(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(wanted[name].shape)}")
    return faults


def load_parameters(parameters: Mapping[str, SlotParameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
    """
    faults = shape_faults({name: one.value for name, one in parameters.items()}, tensors)
    raise_all(AdapterError, faults, "the tensors do not fit this model")
    for name, one in parameters.items():
        one.value.copy_(tensors[name])


def answering(model: nn.Module, bank: Slots | None) -> nn.Module:
    """What gives the logits of padded batches: the model, or what the slots put in its place."""
    return model if bank is None or bank.padded_model is None else bank.padded_model


def is_adapted(routing: Routing, what: str) -> bool:
    """Whether a batch is meant for slot 0, of a method that has no other and takes the whole batch or none of it.

    Raises:
        RoutingError: Slots are mixed in one batch, or there is no such slot.
    """
    slots = set(routing.slots)
    if slots not in ({0}, {BASE_ONLY}):
        raise RoutingError(f"{what} takes a batch of slot 0 or of the base, not of {sorted(slots)}")
    return slots == {0}
