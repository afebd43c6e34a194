"""Turn a model with a merged bank back into the plain model, and name what the adapter changed in it."""

import hashlib
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.lora import LoraBank


def changed_tensors(bank: LoraBank, slot: int) -> set[str]:
    """Names, in the plain model, of the tensors that merging this slot changes; an update of zero changes nothing."""
    names = set()
    for path, layer in bank.layers.items():
        if layer.ranks[slot] and layer.delta(slot).any():
            names.add(f"{path}.weight")
        if layer.lora_bias is not None and layer.trains_bias[slot] and layer.lora_bias[slot].any():
            names.add(f"{path}.bias")
    for path, extra in bank.biases.items():
        if slot in extra.slots and extra.change[slot].any():
            names.add(f"{path}.bias")
    for path, saved in bank.saved.items():
        if str(slot) in saved.copies:
            original = saved.original.state_dict()
            copy = saved.copies[str(slot)].state_dict()
            names |= {
                f"{path}.{name}" for name in copy if not torch.equal(copy[name].to(original[name]), original[name])
            }
    return names


def digests(model: PreTrainedModel, bank: LoraBank, dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of every tensor of the base, by its name in the plain model, as its bytes are in ``dtype``."""
    inner = {f"{path}.base_layer.": f"{path}." for path in bank.layers}
    inner |= {f"{path}.original.": f"{path}." for path in bank.saved}
    found = {}
    for name, tensor in model.state_dict().items():
        if _belongs_to_slots(name, bank):
            continue
        for wrapped, plain in inner.items():
            if name.startswith(wrapped):
                name = plain + name.removeprefix(wrapped)
        found[name] = digest(tensor, dtype)
    return found


def digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """SHA-256 of a tensor's bytes in ``dtype``; integers keep their own type."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def unwrap(model: PreTrainedModel, bank: LoraBank, slot: int) -> bool:
    """Put the merged plain layers in the place of the bank's. The bank is of no use afterwards.

    Args:
        model: The bank's model; changed in place.
        bank: With ``slot`` merged.
        slot: The merged slot.

    Returns:
        Whether input embeddings and output head were tied and are two matrices now; the config then says so too.
    """
    for path, layer in bank.layers.items():
        model.set_submodule(path, layer.base_layer)
    for path, saved in bank.saved.items():
        own = str(slot) in saved.copies
        model.set_submodule(path, saved.copies[str(slot)] if own else saved.original)
    for path, extra in bank.biases.items():
        owner = model.get_submodule(path)
        bias = extra.bias
        if slot in extra.slots:
            total = bias.to(extra.change.dtype) + extra.change.data[slot]
            owner.bias = nn.Parameter(total.to(bias.dtype), requires_grad=False)
        del owner.lora_bias
    return _untie(model)


def _belongs_to_slots(name: str, bank: LoraBank) -> bool:
    own = [f"{path}.lora_" for path in [*bank.layers, *bank.biases]] + [f"{path}.copies." for path in bank.saved]
    return name.startswith(tuple(own))


def _untie(model: PreTrainedModel) -> bool:
    """Say in the config that head and embeddings are no longer one matrix, or saving would drop one of them."""
    config = model.config
    text_config = config.get_text_config()
    if not (getattr(config, "tie_word_embeddings", False) or getattr(text_config, "tie_word_embeddings", False)):
        return False
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or cast(Tensor, head.weight).data_ptr() == cast(Tensor, embeddings.weight).data_ptr():
        return False
    config.tie_word_embeddings = text_config.tie_word_embeddings = False
    return True
