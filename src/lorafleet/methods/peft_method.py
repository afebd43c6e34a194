"""PEFT's own methods as slot 0 on a frozen base.

Those that change layers in place (IA³, VeRA, OFT, LoHa, …) leave the model the object it was, which computes with them.
Those that put virtual tokens before each row (prefix, prompt and p-tuning) go through PEFT's model, in padded batches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.errors import AdapterError, ConfigError, raise_all
from lorafleet.lora import Routing, SlotParameter
from lorafleet.lora.slots import is_adapted, shape_faults
from lorafleet.methods.dropout import seeded_by
from lorafleet.methods.peft_options import prepends


class PeftMethod:
    """One PEFT adapter on a model.

    Args:
        model: Changed in place by PEFT; its own weights stop requiring gradients.
        config: Of :func:`~lorafleet.methods.peft_options.peft_config`.
        seed: What the adapter starts from.

    Raises:
        ConfigError: PEFT cannot put this method on this model.
    """

    mixes_slots = False

    def __init__(self, model: PreTrainedModel, config: PeftConfig, seed: int = 0) -> None:
        self.model, self.enabled = model.requires_grad_(False), True
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                self.peft: PeftModel = get_peft_model(model, config)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ConfigError(
                    f"{config.peft_type} does not fit {type(model).__name__}: {error}; name layers it can take with "
                    "target_modules"
                ) from error
        self.tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.padded_model = self.peft if prepends(config) else None
        self.eval()

    def slot_parameters(self, slot: int) -> dict[str, SlotParameter]:
        """Every parameter that PEFT trains, by its name."""
        if slot != 0:
            raise AdapterError(f"a PEFT adapter has slot 0 alone, not {slot}")
        return {n: SlotParameter(p, None) for n, p in self.peft.named_parameters() if p.requires_grad}

    def state_dict(self, slot: int) -> dict[str, Tensor]:
        """Copies of the adapter's tensors, under the names of PEFT's files."""
        state: dict[str, Tensor] = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state_dict(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Put an adapter's tensors in.

        Raises:
            AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
        """
        raise_all(AdapterError, shape_faults(self.state_dict(slot), tensors), "the adapter does not fit this model")
        set_peft_model_state_dict(self.peft, dict(tensors))
        if self.padded_model is not None:
            # A file holds the virtual tokens, not the network that they may have come from; they are used as they are.
            self.peft.peft_config["default"].inference_mode = True

    @torch.no_grad()
    def virtual_cache(self, rows: int) -> Any:
        """Keys and values of the virtual tokens; none of a method without them, or within ``disabled``."""
        if self.padded_model is None or not self.enabled:
            return None
        prompt = self.peft.get_prompt(rows)
        if not isinstance(prompt, Tensor):
            return prompt  # a prefix is keys and values itself
        # Nothing before them, so nothing of the row is in them.
        return self.model(inputs_embeds=prompt.to(self.model.dtype), use_cache=True).past_key_values

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self.peft.zero_grad(set_to_none=True)

    @contextmanager
    def route(self, routing: Routing) -> Iterator[None]:
        """Let all tokens go through the adapter, or none; its dropout follows from the routing's key.

        Raises:
            RoutingError: Slots are mixed in one batch, or there is no such slot.
        """
        adapted = is_adapted(routing, "a PEFT adapter")
        with seeded_by(routing, self.model.device) if adapted else self.disabled():
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within a ``with`` block the model answers as the bare base."""
        before, self.enabled = self.enabled, False
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self.enabled = before

    def train(self, mode: bool = True) -> None:
        """Turn the adapter's dropout on or off; the base stays in ``eval()``."""
        self.model.eval()
        if self.padded_model is not None:
            self.peft.prompt_encoder.train(mode)
        for tuner in self.tuners:
            for name in tuner.adapter_layer_names:
                part = getattr(tuner, name, None)
                if isinstance(part, nn.Module):
                    part.train(mode)
            tuner.training = mode
            for dropout in _dropouts(tuner):
                dropout.train(mode)

    def eval(self) -> None:
        """Turn the adapter's dropout off."""
        self.train(False)

    def drops(self, slot: int) -> bool:
        """Whether the adapter drops anything now."""
        dropouts = [dropout for tuner in self.tuners for dropout in _dropouts(tuner)]
        if self.padded_model is not None:
            dropouts += [module for module in self.peft.prompt_encoder.modules() if isinstance(module, nn.Dropout)]
        return slot == 0 and any(dropout.training and dropout.p > 0 for dropout in dropouts)

    def speed_up(self, run: Callable[[], object], *, training: bool = True) -> None:
        """Nothing: the layers are PEFT's."""


def _dropouts(tuner: BaseTunerLayer) -> list[nn.Dropout]:
    """The dropouts of a tuner's own, those inside the layer that it wraps left out."""
    inside = {id(module) for module in tuner.get_base_layer().modules()}
    return [m for m in tuner.modules() if isinstance(m, nn.Dropout) and id(m) not in inside]
