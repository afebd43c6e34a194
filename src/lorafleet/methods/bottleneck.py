"""Bottleneck adapters: small networks in the blocks of a frozen base (Houlsby et al. 2019, Pfeiffer et al. 2021)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorafleet.config.bottleneck import BottleneckConfig
from lorafleet.errors import AdapterError, ModelError, raise_all
from lorafleet.lora import Routing, SlotParameter
from lorafleet.lora.init import generator_for
from lorafleet.lora.layer import linear_shape
from lorafleet.lora.slots import is_adapted, load_parameters
from lorafleet.lora.targets import in_attention, layer_index, linear_layers

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bottleneck(nn.Module):
    """``h + W_up·f(W_down·h + b_down) + b_up``; at the start ``W_up`` is zero, so that h goes through as it is.

    The papers start near the identity instead, with W_up of standard deviation 0.01 or as BERT's layers.

    Args:
        width: d of h ``(..., d)``.
        config: Width m and nonlinearity.
        generator: ``W_down (m, d)`` is normal with standard deviation 0.01, as in Houlsby et al.; it follows from this.
        like: A tensor of the base, for device and precision; at least float32.
    """

    def __init__(self, width: int, config: BottleneckConfig, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.down = nn.Linear(width, config.bottleneck_size, **kind)
        self.up = nn.Linear(config.bottleneck_size, width, **kind)
        self.activation = _ACTIVATIONS[config.activation]
        start = torch.empty(config.bottleneck_size, width).normal_(0, 0.01, generator=generator)
        with torch.no_grad():
            self.down.weight.copy_(start)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """``(..., d)`` to the same shape."""
        low = self.activation(self.down(h.to(self.down.weight.dtype)))
        return h + cast(Tensor, self.up(low)).to(h.dtype)


class BottleneckAdapter:
    """Bottlenecks in every block of a model as slot 0; slot -1 is the base.

    Args:
        model: Its own weights stop requiring gradients.
        config: The adapter's knobs.
        seed: What it starts from.

    Raises:
        ModelError: Its blocks have no last layer of attention and MLP that gives the hidden size.
    """

    padded_model = None
    mixes_slots = False

    def __init__(self, model: PreTrainedModel, config: BottleneckConfig, seed: int = 0) -> None:
        self.model, self.config, self.enabled = model.requires_grad_(False), config, True
        layers = linear_layers(model)
        self.bottlenecks: dict[str, Bottleneck] = {}
        for path in find_places(model, config):
            layer = layers[path]
            start = generator_for(seed, path)
            added = Bottleneck(linear_shape(layer)[1], config, start, cast(Tensor, layer.weight))
            layer.register_forward_hook(self._hook(added))
            self.bottlenecks[path] = added

    def _hook(self, added: Bottleneck) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _layer, _inputs, output: added(output) if self.enabled else output

    def slot_parameters(self, slot: int) -> dict[str, SlotParameter]:
        """Weights and biases of the bottlenecks, as ``model.layers.0.mlp.down_proj.up.weight``."""
        if slot != 0:
            raise AdapterError(f"bottleneck adapters have slot 0 alone, not {slot}")
        return {
            f"{path}.{name}": SlotParameter(parameter, None)
            for path, added in self.bottlenecks.items()
            for name, parameter in added.named_parameters()
        }

    def state_dict(self, slot: int) -> dict[str, Tensor]:
        """Copies of all of them."""
        return {name: one.value.clone() for name, one in self.slot_parameters(slot).items()}

    def load_state_dict(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Put them back.

        Raises:
            AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
        """
        load_parameters(self.slot_parameters(slot), tensors)

    def virtual_cache(self, rows: int) -> None:
        """None: nothing stands before rows."""

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for one in self.slot_parameters(0).values():
            one.parameter.grad = None

    def route(self, routing: Routing) -> AbstractContextManager[None]:
        """Let all tokens go through the bottlenecks, or none.

        Raises:
            RoutingError: Slots are mixed in one batch, or there is no such slot.
        """
        return self._switched(is_adapted(routing, "a bottleneck adapter"))

    def disabled(self) -> AbstractContextManager[None]:
        """Within a ``with`` block the model answers as the bare base."""
        return self._switched(False)

    @contextmanager
    def _switched(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before

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


def find_places(model: PreTrainedModel, config: BottleneckConfig) -> list[str]:
    """The layers that bottlenecks stand behind: the last linear one of attention and of the MLP in every block.

    Which one is last is seen in one pass over a few tokens.

    Raises:
        ModelError: There is none, or it does not give the hidden size, as in a mixture of experts.
    """
    wanted = {"houlsby": (True, False), "pfeiffer": (False,)}[config.style]
    hidden = model.config.get_text_config().hidden_size
    layers, last = linear_layers(model), dict[tuple[int, bool], str]()
    # A model without weights cannot be run; the order of declaration tells whether there are such layers at all.
    for path in layers if model.device.type == "meta" else _called(model, layers):
        block = layer_index(path)
        if block is not None:
            last[block, in_attention(path)] = path
    blocks = sorted({block for block, _ in last})
    faults = [] if blocks else [f"{type(model).__name__} has no numbered blocks with linear layers"]
    for block in blocks:
        for attention in wanted:
            place, what = last.get((block, attention)), "attention" if attention else "MLP"
            if place is None or linear_shape(layers[place])[1] != hidden:
                found = f"only {place}, which gives {linear_shape(layers[place])[1]}" if place else "none"
                faults.append(f"block {block}: no last linear layer of its {what} that gives {hidden}; {found}")
    raise_all(ModelError, faults, "bottleneck adapters do not fit this architecture")
    return [last[block, attention] for block in blocks for attention in wanted]


def _called(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[str]:
    """The paths of linear layers in the order in which a pass calls them."""
    order: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, path=path: order.append(path))
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(3, device=model.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return order
