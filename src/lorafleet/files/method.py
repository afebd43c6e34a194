"""What another method than LoRA trained, on disk.

A PEFT method is kept as PEFT keeps it, so that ``PeftModel.from_pretrained`` loads the folder:

    adapter_config.json, adapter_model.safetensors

Methods that PEFT has not (bottleneck, bitfit) have files of their own:

    method.json            {"format": 1, "method": "bottleneck", "options": {"style": "pfeiffer", "bottleneck_size": 64,
                           "activation": "gelu"}, "base_model_name_or_path": "…", "revision": null}
    method.safetensors     by the base's names: model.layers.0.mlp.down_proj.down.weight (m, d), .down.bias (m,),
                           .up.weight (d, m), .up.bias (d,) of the bottleneck behind that layer; for bitfit the biases
                           themselves, as transformer.h.0.ln_1.bias

``lorafleet.json`` beside them is the manifest of every adapter.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafleet.errors import AdapterError
from lorafleet.files.adapter import CONFIG, WEIGHTS, Adapter, load_adapter, refuse_pickled
from lorafleet.files.atomic import json_bytes, tensor_bytes
from lorafleet.files.manifest import read_json, read_tensors, write_with_manifest

METHOD, METHOD_WEIGHTS = "method.json", "method.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class SavedMethod:
    """A trained method as it was read.

    Attributes:
        kind: ``bottleneck``, ``bitfit``, or PEFT's type in lower case.
        options: Its settings, as they were written; of a PEFT method the whole of ``adapter_config.json``.
        tensors: On the CPU, as saved.
        base_name: The base it was trained on, as its writer named it.
        base_revision: The base's commit.
        metadata: What lorafleet recorded beside it; empty for one that PEFT wrote.
    """

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    base_name: str | None
    base_revision: str | None
    metadata: dict[str, Any]


def save_method(
    folder: str | os.PathLike[str],
    kind: str,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    base_name: str,
    base_revision: str | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write a trained method; one that was there is replaced at once.

    Args:
        folder: Created where missing; other files in it are left alone.
        kind: As in :class:`SavedMethod`.
        options: Its settings in JSON's types; those of a PEFT method name its ``peft_type``.
        tensors: As its ``state_dict`` gives them.
        base_name: The base's hub id, path or alias.
        base_revision: The base's commit.
        metadata: Anything in JSON's types; kept in ``lorafleet.json``.

    Raises:
        AdapterError: The disk is full or fails.
    """
    base = {"base_model_name_or_path": base_name, "revision": base_revision}
    if "peft_type" in options:
        contents = {WEIGHTS: tensor_bytes(tensors), CONFIG: json_bytes({**options, **base, "inference_mode": True})}
    else:
        own = {"format": _FORMAT, "method": kind, "options": dict(options), **base}
        contents = {METHOD_WEIGHTS: tensor_bytes(tensors), METHOD: json_bytes(own)}
    write_with_manifest(folder, contents, metadata)


def saved_kind(folder: str | os.PathLike[str]) -> str:
    """The method that a folder holds: ``lora``, another PEFT type in lower case, or what ``method.json`` names.

    Raises:
        AdapterError: There is no such folder, or its config is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder at {folder}")
    if (folder / METHOD).exists():
        return str(read_json(folder, METHOD).get("method"))
    if (folder / "config.json").exists() and not (folder / CONFIG).exists():
        raise AdapterError(f"{folder} holds a whole model, no adapter; name it with model")
    return str(read_json(folder, CONFIG).get("peft_type") or "lora").lower()


def load_method(folder: str | os.PathLike[str]) -> SavedMethod:
    """Read what ``save_method`` or PEFT wrote.

    Raises:
        AdapterError: A file is missing, pickled, damaged, changed since it was written, or a link out of the folder.
    """
    folder = Path(folder)
    kind = saved_kind(folder)
    if (folder / METHOD).exists():
        own = read_json(folder, METHOD)
        if own.get("format") != _FORMAT or not isinstance(own.get("options"), dict):
            raise AdapterError(f"{folder / METHOD} has format {own.get('format')!r}; this release reads {_FORMAT}")
        tensors, metadata = read_tensors(folder, METHOD_WEIGHTS, METHOD)
        return SavedMethod(kind, own["options"], tensors, own["base_model_name_or_path"], own["revision"], metadata)
    peft = read_json(folder, CONFIG)
    refuse_pickled(folder)
    tensors, metadata = read_tensors(folder, WEIGHTS, CONFIG)
    return SavedMethod(kind, peft, tensors, peft.get("base_model_name_or_path"), peft.get("revision"), metadata)


def load_saved(folder: str | os.PathLike[str]) -> Adapter | SavedMethod:
    """Read what was trained, whatever its method.

    Raises:
        AdapterError: Its files are wrong.
    """
    return load_adapter(folder) if saved_kind(folder) == "lora" else load_method(folder)
