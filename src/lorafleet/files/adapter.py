"""Adapters on disk, in PEFT's format, both directions.

    adapter_config.json         PEFT's own
    adapter_model.safetensors   PEFT's names: base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r)
    lorafleet.json              ours: where it came from, and the SHA-256 of the two above; written last

Reading runs nothing: no pickle, no code that a file names, no path that leaves the folder.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, raise_all
from lorafleet.files.adapter_tensors import in_order, tensor_faults
from lorafleet.files.atomic import json_bytes, tensor_bytes, write_files
from lorafleet.files.peft_config import from_peft, to_peft

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "lorafleet.json"
_FORMAT = 1
_MAX_JSON_BYTES = 16 << 20
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
    contents = {WEIGHTS: tensor_bytes(tensors), CONFIG: json_bytes(peft)}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents[MANIFEST] = json_bytes({"format": _FORMAT, "sha256": hashes, "metadata": dict(metadata)})
    try:
        write_files(folder, contents)
    except OSError as error:
        raise AdapterError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


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
    peft = read_peft_config(folder)
    data = _read_weights(folder)
    metadata = _verified_metadata(folder, {CONFIG: _read(folder, CONFIG, _MAX_JSON_BYTES), WEIGHTS: data})
    try:
        tensors = in_order(load(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {error}; copy or download it again") from error
    config, faults = from_peft(peft, tensors)
    if config is not None:
        faults += tensor_faults(config, tensors)
    raise_all(AdapterError, faults, f"the adapter in {folder} cannot be used")
    assert config is not None  # it is None only with faults
    return Adapter(config, tensors, peft.get("base_model_name_or_path"), peft.get("revision"), metadata)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as PEFT wrote it.

    Raises:
        AdapterError: It is missing, no JSON object, or a link out of the folder.
    """
    try:
        value = json.loads(_read(folder, CONFIG, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{folder / CONFIG} holds a JSON {type(value).__name__}; an object is expected")
    return value


def _read_weights(folder: Path) -> bytes:
    if not (folder / WEIGHTS).exists():
        pickled = [name for name in _PICKLED if (folder / name).exists()]
        if pickled:
            raise AdapterError(
                f"{folder / pickled[0]} is pickled: reading it can run code, so it is refused. If you trust it, load "
                "it with PEFT and save_pretrained it again; that writes adapter_model.safetensors"
            )
    return _read(folder, WEIGHTS)


def _read(folder: Path, name: str, limit: int | None = None) -> bytes:
    """The bytes of a regular file that lies in ``folder``, links followed."""
    path = folder / name
    if not path.exists():
        what = "is a link to nothing" if path.is_symlink() else "is missing"
        raise AdapterError(f"{path} {what}; an adapter has {CONFIG} and {WEIGHTS}")
    real, root = path.resolve(), _root(folder)
    if not real.is_relative_to(root):
        raise AdapterError(f"{path} is a link to {real}, outside its folder; copy the file itself (cp -rL)")
    if not real.is_file():
        raise AdapterError(f"{path} is no regular file")
    if limit is not None and real.stat().st_size > limit:
        raise AdapterError(f"{path} has {real.stat().st_size} bytes; more than {limit} is no adapter's config")
    return real.read_bytes()


def _root(folder: Path) -> Path:
    """The folder that links may not leave. In the hub's cache, files are links to ``blobs`` beside ``snapshots``."""
    real = folder.resolve()
    repository = real.parent.parent
    in_cache = real.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if in_cache else real


def _verified_metadata(folder: Path, contents: Mapping[str, bytes]) -> dict[str, Any]:
    """What ``lorafleet.json`` records, after the hashes in it were compared; empty where there is none."""
    if not (folder / MANIFEST).exists():
        return {}
    try:
        manifest = json.loads(_read(folder, MANIFEST, _MAX_JSON_BYTES))
        form, hashes, metadata = manifest["format"], dict(manifest["sha256"]), dict(manifest["metadata"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    if form != _FORMAT:
        raise AdapterError(f"{folder / MANIFEST} has format {form!r}; this release reads format {_FORMAT}")
    changed = [n for n, data in contents.items() if hashes.get(n) != hashlib.sha256(data).hexdigest()]
    faults = [f"{folder / name} is not the file that was saved: its SHA-256 differs" for name in changed]
    if faults:
        faults[-1] += f"; restore it, or delete {MANIFEST} if the change was meant"
    raise_all(AdapterError, faults, f"the adapter in {folder} was changed")
    return metadata
