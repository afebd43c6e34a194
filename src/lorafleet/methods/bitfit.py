"""BitFit: only the biases of a model train (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.errors import AdapterError, ModelError, RoutingError, raise_all
from lorafleet.lora import BASE_ONLY, Routing, SlotParameter
from lorafleet.lora.routing import Router
from lorafleet.lora.saved import SlotBias
from lorafleet.lora.slots import shape_faults


class BiasSlots:
    """Changes of all biases of a model, one for each slot, on frozen weights.

    Args:
        model: Its own parameters stop requiring gradients.
        num_slots: Number of slots K.

    Raises:
        ModelError: It has no biases, as Llama and most models after it.
    """

    padded_model = None
    mixes_slots = True

    def __init__(self, model: PreTrainedModel, num_slots: int = 1) -> None:
        owners = {p: m for p, m in model.named_modules() if isinstance(getattr(m, "bias", None), nn.Parameter)}
        if not owners:
            raise ModelError(f"{type(model).__name__} has no biases, so bitfit has nothing to train; use lora")
        self.model, self.num_slots, self.router = model.requires_grad_(False), num_slots, Router()
        self.biases = {path: SlotBias(owner, num_slots, self.router) for path, owner in owners.items()}
        for bias in self.biases.values():
            bias.slots.update(range(num_slots))

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise AdapterError(f"there is no slot {slot}; there are {self.num_slots}, counted from 0")

    def slot_parameters(self, slot: int) -> dict[str, SlotParameter]:
        """The slot's changes, as ``transformer.h.0.ln_1.bias``; zero at the start."""
        self._check(slot)
        return {f"{path}.bias": SlotParameter(bias.change, (slot,)) for path, bias in self.biases.items()}

    def state_dict(self, slot: int) -> dict[str, Tensor]:
        """The slot's biases themselves, base and change together, under the model's own names."""
        self._check(slot)
        return {
            f"{path}.bias": bias.bias.to(bias.change.dtype) + bias.change.detach()[slot]
            for path, bias in self.biases.items()
        }

    def load_state_dict(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill a slot with biases.

        Raises:
            AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
        """
        raise_all(AdapterError, shape_faults(self.state_dict(slot), tensors), "the biases do not fit this model")
        for path, bias in self.biases.items():
            change = bias.change.detach()[slot]
            change.copy_(tensors[f"{path}.bias"].to(change) - bias.bias.to(change.dtype))

    def virtual_cache(self, rows: int) -> None:
        """None: nothing stands before rows."""

    def clear_gradients(self) -> None:
        """Forget the gradients of all slots."""
        for bias in self.biases.values():
            bias.change.grad = None

    def route(self, routing: Routing) -> AbstractContextManager[None]:
        """Put a routing in force within a ``with`` block.

        Raises:
            RoutingError: There is no such slot.
        """
        absent = sorted(slot for slot in set(routing.slots) if not BASE_ONLY <= slot < self.num_slots)
        if absent:
            raise RoutingError(f"the routing names slots {absent}; there are {self.num_slots}, counted from 0")
        return self.router.using(routing)

    def disabled(self) -> AbstractContextManager[None]:
        """Within a ``with`` block the model answers as the bare base."""
        return self.router.using(self.router.routing, enabled=False)

    def train(self) -> None:
        """Nothing drops: the base stays in ``eval()``."""
        self.model.eval()

    def eval(self) -> None:
        """As ``train``."""
        self.model.eval()

    def drops(self, slot: int) -> bool:
        """Never."""
        return False

    def speed_up(self, run: Callable[[], object], *, training: bool = True) -> None:
        """Nothing yet: the base's layers are its own."""
