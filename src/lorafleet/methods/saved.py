"""Trained methods to and from their folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafleet.config.bottleneck import BottleneckConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.files.adapter import Adapter, save_adapter
from lorafleet.files.manifest import write_with_manifest
from lorafleet.files.method import SavedMethod, save_method
from lorafleet.files.model_folder import new_folder, save_model, sync_tree
from lorafleet.lora import Slots, inject_lora, without_absent
from lorafleet.methods.bitfit import BiasSlots
from lorafleet.methods.bottleneck import BottleneckAdapter
from lorafleet.methods.method import Method
from lorafleet.methods.peft_method import PeftMethod
from lorafleet.methods.peft_options import config_of_file
from lorafleet.models.load import Base

MODEL = "model"
"""The folder of a model that was trained whole, in the folder of its run."""


def write_method(
    folder: Path, base: Base, method: Method, slots: Slots, slot: int, metadata: Mapping[str, Any]
) -> Path:
    """Write what a slot has learned.

    Returns:
        The folder to use it from: ``folder`` as an adapter, or the whole model's own folder in it.

    Raises:
        AdapterError: The disk is full or fails, or a tensor is not finite.
    """
    if method.kind == "full":
        whole = folder / MODEL
        with new_folder(whole) as temporary:
            save_model(base.model, base.tokenizer, temporary)
            write_with_manifest(temporary, {}, metadata)
            sync_tree(temporary)
        return whole
    tensors = {name: tensor.cpu() for name, tensor in slots.state_dict(slot).items()}
    origin: dict[str, Any] = {"base_name": base.name, "base_revision": base.revision, "metadata": metadata}
    if isinstance(method.config, LoraConfig):
        transposed = any(isinstance(module, Conv1D) for module in base.model.modules())
        save_adapter(folder, method.config, tensors, **origin, fan_in_fan_out=transposed)
    else:
        save_method(folder, method.kind, method.options, tensors, **origin)
    return folder


def restore(model: PreTrainedModel, adapter: Adapter | SavedMethod) -> Slots:
    """Put what was read from a folder on a base, in slot 0, ready to be used.

    Raises:
        AdapterError: It does not fit the model, or is of a kind that is not known here.
        ModelError: The architecture cannot take it.
    """
    if isinstance(adapter, Adapter):
        slots: Slots = inject_lora(model, without_absent(model, adapter.config))
    else:
        slots = _start(model, adapter)
    slots.load_state_dict(0, adapter.tensors)
    slots.eval()
    return slots


def _start(model: PreTrainedModel, saved: SavedMethod) -> Slots:
    if saved.kind == "bitfit":
        return BiasSlots(model)
    try:
        if saved.kind == "bottleneck":
            (config,) = load_sections((BottleneckConfig,), saved.options, {})
            return BottleneckAdapter(model, config)
        return PeftMethod(model, config_of_file(saved.kind, saved.options))
    except ConfigError as error:
        raise AdapterError(f"the adapter cannot be used: {error}") from error
