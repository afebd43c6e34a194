"""The files of an adapter, and beside them ``lorafleet.json``: where they came from and their SHA-256, written last.

Reading runs nothing: no pickle, no code that a file names, no path that leaves the folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lorafleet.errors import AdapterError, raise_all
from lorafleet.files.atomic import json_bytes, write_files

MANIFEST = "lorafleet.json"
_FORMAT = 1
_MAX_JSON_BYTES = 16 << 20


def write_with_manifest(
    folder: str | os.PathLike[str], contents: Mapping[str, bytes], metadata: Mapping[str, Any]
) -> None:
    """Write files and their manifest. An adapter that was there is replaced at once.

    Raises:
        AdapterError: The disk is full or fails.
    """
    hashes = {name: _sha256(data) for name, data in contents.items()}
    manifest = json_bytes({"format": _FORMAT, "sha256": hashes, "metadata": dict(metadata)})
    try:
        write_files(folder, {**contents, MANIFEST: manifest})
    except OSError as error:
        raise AdapterError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        AdapterError: It is missing, no JSON object, or a link out of the folder.
    """
    try:
        value = json.loads(read_file(folder, name, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / name} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{folder / name} holds a JSON {type(value).__name__}; an object is expected")
    return value


def read_tensors(folder: Path, name: str, config: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and what the manifest records beside them.

    Args:
        folder: The adapter's folder.
        name: The file of tensors.
        config: The file beside it, whose hash is compared too.

    Raises:
        AdapterError: A file is missing, damaged, changed since it was written, or a link out of the folder.
    """
    data = read_file(folder, name)
    with ThreadPoolExecutor(1) as beside:  # hashing takes as long as all the rest, and lets other threads run
        digest = beside.submit(_sha256, data)
        try:
            tensors, fault = load(data), None
        except (SafetensorError, ValueError, KeyError) as error:
            tensors, fault = {}, error
        hashes = {config: _sha256(read_file(folder, config, _MAX_JSON_BYTES)), name: digest.result()}
    metadata = _verified_metadata(folder, hashes)
    if fault is not None:
        raise AdapterError(f"{folder / name} is damaged: {fault}; copy or download it again") from fault
    return tensors, metadata


def read_file(folder: Path, name: str, limit: int | None = None) -> bytes:
    """The bytes of a regular file that lies in ``folder``, links followed.

    Raises:
        AdapterError: It is missing, no regular file, larger than ``limit``, or a link out of the folder.
    """
    path = folder / name
    if not path.exists():
        what = "is a link to nothing" if path.is_symlink() else "is missing"
        raise AdapterError(f"{path} {what}; an adapter has a file of tensors and a config beside it")
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _verified_metadata(folder: Path, found: Mapping[str, str]) -> dict[str, Any]:
    """What ``lorafleet.json`` records, after its hashes were compared with those found; empty where there is none."""
    if not (folder / MANIFEST).exists():
        return {}
    try:
        manifest = json.loads(read_file(folder, MANIFEST, _MAX_JSON_BYTES))
        form, hashes, metadata = manifest["format"], dict(manifest["sha256"]), dict(manifest["metadata"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    if form != _FORMAT:
        raise AdapterError(f"{folder / MANIFEST} has format {form!r}; this release reads format {_FORMAT}")
    changed = [name for name, digest in found.items() if hashes.get(name) != digest]
    faults = [f"{folder / name} is not the file that was saved: its SHA-256 differs" for name in changed]
    if faults:
        faults[-1] += f"; restore it, or delete {MANIFEST} if the change was meant"
    raise_all(AdapterError, faults, f"the adapter in {folder} was changed")
    return metadata
