"""The tensors of one slot, by the names that training gives them, and by those that PEFT gives them in a file."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lorafleet.errors import AdapterError, raise_all
from lorafleet.lora.layer import LoraLinear
from lorafleet.lora.saved import SlotBias, SlotModule
from lorafleet.lora.slots import SlotParameter, shape_faults
from lorafleet.lora.targets import PREFIX


def trained_parameters(
    layers: Mapping[str, LoraLinear], biases: Mapping[str, SlotBias], modules: Mapping[str, SlotModule], slot: int
) -> dict[str, SlotParameter]:
    """What training may change for a slot, by a stable name; ``value`` and ``grad`` are views (of Bᵀ for B)."""
    found: dict[str, SlotParameter] = {}
    for path, layer in layers.items():
        if layer.ranks[slot]:
            part = (slot, slice(layer.trained_ranks[slot]))
            name_A, name_B = (name.removesuffix(".weight") for name in _names(layer))
            found[f"{path}.{name_A}"] = SlotParameter(layer.lora_A, part)
            found[f"{path}.{name_B}"] = SlotParameter(layer.lora_B, part)
        if layer.lora_magnitude is not None and layer.learns_magnitude[slot]:
            found[f"{path}.lora_magnitude"] = SlotParameter(layer.lora_magnitude, (slot,))
        if layer.lora_bias is not None and layer.trains_bias[slot]:
            found[f"{path}.lora_bias"] = SlotParameter(layer.lora_bias, (slot,))
    for path, extra in biases.items():
        if slot in extra.slots:
            found[f"{path}.lora_bias"] = SlotParameter(extra.change, (slot,))
    for path, saved in modules.items():
        if str(slot) in saved.copies:
            for name, parameter in saved.copies[str(slot)].named_parameters():
                found[f"{path}.{name}"] = SlotParameter(parameter, None)
    return dict(sorted(found.items()))


def file_tensors(
    layers: Mapping[str, LoraLinear], biases: Mapping[str, SlotBias], modules: Mapping[str, SlotModule], slot: int
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """A slot's tensors under PEFT's names: a view, and the base tensor that the file's value includes."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, layer in layers.items():
        rank = layer.ranks[slot]
        if rank:
            name_A, name_B = _names(layer)
            found[f"{PREFIX}{path}.{name_A}"] = (layer.lora_A.detach()[slot, :rank], None)
            found[f"{PREFIX}{path}.{name_B}"] = (layer.lora_B.detach()[slot, :rank].T, None)
        if layer.lora_magnitude is not None and layer.learns_magnitude[slot]:
            found[f"{PREFIX}{path}.lora_magnitude_vector"] = (layer.lora_magnitude.detach()[slot], None)
        if layer.lora_bias is not None and layer.trains_bias[slot]:
            # A layer that this slot does not adapt is no LoRA layer in PEFT's eyes: its bias keeps its own name.
            name = "base_layer.bias" if rank else "bias"
            found[f"{PREFIX}{path}.{name}"] = (layer.lora_bias.data[slot], layer.bias)
    for path, extra in biases.items():
        if slot in extra.slots:
            found[f"{PREFIX}{path}.bias"] = (extra.change.data[slot], extra.bias)
    for path, saved in modules.items():
        if str(slot) in saved.copies:
            for name, tensor in saved.copies[str(slot)].state_dict().items():
                found[f"{PREFIX}{path}.{name}"] = (tensor, None)
    return found


def fill(
    views: Mapping[str, tuple[Tensor, Tensor | None]], tensors: Mapping[str, Tensor], layers: Mapping[str, LoraLinear]
) -> None:
    """Copy a file's tensors into a slot's views.

    Raises:
        AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
    """
    brought = {name: _bases_own(name, layers) for name in tensors if name not in views}
    faults = [
        f"{name} differs from the base's, which the adapter needs as it was: name the base it was trained on"
        for name, own in brought.items()
        if own is not None and not _equal(own, tensors[name])
    ]
    rest = {name: tensor for name, tensor in tensors.items() if brought.get(name) is None}
    faults += shape_faults({name: view for name, (view, _) in views.items()}, rest)
    raise_all(AdapterError, faults, "the adapter does not fit this model")
    for name, (view, base) in views.items():
        view.copy_(tensors[name])
        if base is not None:
            view -= base.to(view.dtype)


def _bases_own(name: str, layers: Mapping[str, LoraLinear]) -> Tensor | None:
    """The base's tensor that PEFT writes beside the A and B of an embedding or of the output head, by its name."""
    path, _, own = name.removeprefix(PREFIX).rpartition(".base_layer.")
    layer = layers.get(path) if own in ("weight", "bias") else None
    return None if layer is None else cast("Tensor | None", getattr(layer, own))


def _names(layer: LoraLinear) -> tuple[str, str]:
    """What PEFT calls a layer's A and B."""
    return ("lora_embedding_A", "lora_embedding_B") if layer.embeds else ("lora_A.weight", "lora_B.weight")


def _equal(weight: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor is what the base has, in the precision of one of them."""
    if weight.shape != tensor.shape or weight.is_meta:
        return weight.shape == tensor.shape
    weight = weight.cpu()
    return torch.equal(weight.to(tensor.dtype), tensor) or torch.equal(weight, tensor.to(weight.dtype))
