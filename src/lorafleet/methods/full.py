"""Full fine-tuning: every weight of the model trains, in the one slot there is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lorafleet.errors import ModelError, RoutingError
from lorafleet.lora import Routing, SlotParameter
from lorafleet.lora.slots import load_parameters
from lorafleet.methods.dropout import seeded_by


class FullModel:
    """All weights of a model as slot 0. There is no base beside it: what training changes is the model itself.

    The model's own dropout is on in training, as its config has it, and follows from the routing's keys.

    Args:
        model: All its parameters will require gradients; tied ones train as one.

    Raises:
        ModelError: Weights are quantized, so that they have no gradient.
    """

    padded_model = None
    mixes_slots = False

    def __init__(self, model: PreTrainedModel) -> None:
        fixed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
        if fixed:
            raise ModelError(
                f"{len(fixed)} weights are quantized, the first is {fixed[0]}; full fine-tuning needs the base "
                "in float32 or bfloat16"
            )
        self.model = model.requires_grad_(True)
        self._drops = any(model.config.to_dict()[key] for key in dropout_keys(model.config))
        self.train()

    def slot_parameters(self, slot: int) -> dict[str, SlotParameter]:
        """Every parameter of the model, by its name."""
        _check_slot(slot)
        return {name: SlotParameter(parameter, None) for name, parameter in self.model.named_parameters()}

    def state_dict(self, slot: int) -> dict[str, Tensor]:
        """Copies of all weights; of tied ones, one."""
        return {name: one.value.clone() for name, one in self.slot_parameters(slot).items()}

    def load_state_dict(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Put weights back.

        Raises:
            AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
        """
        load_parameters(self.slot_parameters(slot), tensors)

    def virtual_cache(self, rows: int) -> None:
        """None: nothing stands before rows."""

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self.model.zero_grad(set_to_none=True)

    @contextmanager
    def route(self, routing: Routing) -> Iterator[None]:
        """Make sure that all tokens are meant for slot 0, and let dropout follow from the routing's key.

        Raises:
            RoutingError: Another slot is named; the base, slot -1, is gone once its weights train.
        """
        for slot in set(routing.slots):
            _check_slot(slot)
        with seeded_by(routing, self.model.device):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it is, without dropout: there is nothing to take off."""
        mode = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(mode)

    def train(self) -> None:
        """Turn the model's own dropout on."""
        self.model.train()

    def eval(self) -> None:
        """Turn it off."""
        self.model.eval()

    def drops(self, slot: int) -> bool:
        """Whether the model drops anything now."""
        return self._drops and self.model.training

    def speed_up(self, run: Callable[[], object], *, training: bool = True) -> None:
        """Nothing: weights that change cannot be packed."""


def dropout_keys(config: PreTrainedConfig) -> list[str]:
    """The names under which a model's config has its dropouts; those of heads that a language model lacks left out."""
    others = ("classifier", "summary")
    return [key for key in config.to_dict() if "drop" in key and not key.startswith(others)]


def _check_slot(slot: int) -> None:
    if slot != 0:
        raise RoutingError(f"full fine-tuning has slot 0 alone, not {slot}; measure the base before it trains")
