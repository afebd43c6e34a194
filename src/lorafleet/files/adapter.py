"""Adapters on disk, in PEFT's format, both directions.

adapter_config.json         PEFT's own
adapter_model.safetensors   PEFT's names: base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r)
lorafleet.json              ours: where it came from, and the SHA-256 of the two above; written last
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, raise_all
from lorafleet.files.adapter_tensors import in_order, tensor_faults
from lorafleet.files.atomic import json_bytes, tensor_bytes
from lorafleet.files.manifest import read_json, read_tensors, write_with_manifest
from lorafleet.files.peft_config import from_peft, to_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read.

    Attributes:
        config: What it looks like; ``target_modules`` as PEFT wrote it.
        tensors: By PEFT's names, on the CPU, as saved.
        base_name: The base it was trained on, as its writer named it.
        base_revision: The base's commit.
        metadata: What lorafleet recorded beside it; empty for an adapter that PEFT wrote.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    base_name: str | None
    base_revision: str | None
    metadata: dict[str, Any]


def save_adapter(
    folder: str | os.PathLike[str],
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    *,
    base_name: str,
    base_revision: str | None = None,
    metadata: Mapping[str, Any],
    fan_in_fan_out: bool = False,
) -> None:
    """Write an adapter that plain ``PeftModel.from_pretrained`` loads. An adapter that was there is replaced at once.

    ``target_modules`` and ``modules_to_save`` are written as the lists of the modules that have tensors, so that PEFT
    wraps exactly these, whatever shorthand, regex or exclusion chose them.

    Args:
        folder: Created where missing; other files in it are left alone.
        config: Its ``r``, ``lora_alpha``, patterns, rsLoRA and bias are written as they are.
        tensors: By PEFT's names, as ``LoraBank.state_dict`` gives them.
        base_name: The base's hub id, path or alias.
        base_revision: The base's commit.
        metadata: Anything in JSON's types; kept in ``lorafleet.json``.
        fan_in_fan_out: True where the modules are GPT-2's ``Conv1D``; spares PEFT's users a warning.

    Raises:
        AdapterError: A tensor's name, shape or value does not fit (all are listed), or the disk is full or fails.
    """
    config = config.as_plain()
    raise_all(AdapterError, tensor_faults(config, tensors), "the adapter cannot be saved")
    peft = to_peft(config, tensors, base_name=base_name, base_revision=base_revision, fan_in_fan_out=fan_in_fan_out)
    write_with_manifest(folder, {WEIGHTS: tensor_bytes(tensors), CONFIG: json_bytes(peft)}, metadata)


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter that lorafleet or PEFT wrote.

    Args:
        folder: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: A file is missing, pickled, damaged, changed since it was written, or a link out of the folder;
            the config asks for what plain LoRA is not; tensors are missing, surplus or of the wrong shape. All faults
            of one kind are listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder at {folder}")
    peft = read_json(folder, CONFIG)
    refuse_pickled(folder)
    tensors, metadata = read_tensors(folder, WEIGHTS, CONFIG)
    tensors = in_order(tensors)
    config, faults = from_peft(peft, tensors)
    if config is not None:
        faults += tensor_faults(config, tensors)
    raise_all(AdapterError, faults, f"the adapter in {folder} cannot be used")
    assert config is not None  # it is None only with faults
    return Adapter(config, tensors, peft.get("base_model_name_or_path"), peft.get("revision"), metadata)


def refuse_pickled(folder: Path) -> None:
    """Say what to do about an adapter of which there are pickled tensors only.

    Raises:
        AdapterError: It is one.
    """
    pickled = [name for name in _PICKLED if (folder / name).exists()]
    if pickled and not (folder / WEIGHTS).exists():
        raise AdapterError(
            f"{folder / pickled[0]} is pickled: reading it can run code, so it is refused. Convert it with `lorafleet "
            f"adapters convert {folder / pickled[0]} --output-dir FOLDER`, which runs nothing of it, or save it again "
            "with save_pretrained where it was made"
        )
