"""Write files so that a crash, a full disk or a failing one leaves the old file or the new one, never a part of it.

Every write goes to a temporary file in the same folder, is flushed to disk, and is renamed into place.
"""

import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from lorafleet.models.digest import sha256_file, sha256_json

__all__ = [
    "json_bytes",
    "save_tensors",
    "sha256_file",
    "sha256_json",
    "sync_folder",
    "tensor_bytes",
    "write_bytes",
    "write_files",
    "write_json",
    "write_new_file",
    "write_new_tensors",
    "write_text",
]

logger = logging.getLogger(__name__)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at ``path`` by ``data``, at once and on disk. Its folder is created where missing.

    Raises:
        OSError: The disk is full or fails; the file is as it was.
    """
    path = Path(path)
    write_files(path.parent, {path.name: data})


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """``write_bytes`` of ``value`` as indented JSON; see :func:`json_bytes`."""
    write_bytes(path, json_bytes(value))


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """``write_bytes`` of tensors as safetensors; equal input gives equal bytes."""
    write_bytes(path, tensor_bytes(tensors, metadata))


def json_bytes(value: Any, *, indent: int | None = 2) -> bytes:
    """``value`` as JSON in UTF-8, its keys in their order; NaN and infinity, which JSON lacks, as null."""
    return (json.dumps(_finite(value), indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors in the safetensors format.

    Args:
        tensors: Of any device, layout and sharing; each is written whole.
        metadata: Text for the file's header; ``format: pt`` is added, which transformers and PEFT expect.
    """
    data = save(_apart(tensors), {"format": "pt"})
    return _with_metadata(data, {"format": "pt", **metadata}) if metadata else data


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Replace several files of one folder together.

    All are written and flushed before the first is renamed into place, so a full disk changes nothing; should a
    rename fail, those done are undone. Only a crash between two renames can mix old and new.

    Args:
        folder: Created where missing.
        contents: File names and their new bytes, renamed in this order.

    Raises:
        OSError: The disk is full or fails; the files are as they were.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    staged = {name: folder / f".{name}.{token}.tmp" for name in contents}
    backups = {name: folder / f".{name}.{token}.old" for name in contents if len(contents) > 1}
    replaced: list[str] = []
    try:
        for name, data in contents.items():
            write_new_file(staged[name], data)
        for name, backup in backups.items():
            if (folder / name).exists():
                _link(folder / name, backup)
        for name in contents:
            os.replace(staged[name], folder / name)
            replaced.append(name)
        sync_folder(folder)
    except BaseException:
        for name in replaced if backups else ():
            if backups[name].exists():
                os.replace(backups[name], folder / name)
            else:
                (folder / name).unlink()
        raise
    finally:
        _discard([*staged.values(), *backups.values()])


def write_new_file(path: Path, data: bytes) -> None:
    """Create a file that must not exist yet, write ``data`` and flush it to disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def write_new_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Create a safetensors file straight from the tensors' memory, flush it to disk, and return its SHA-256.

    :func:`tensor_bytes` would hold everything twice more: of a whole model and its optimizer, gigabytes.

    Raises:
        OSError: The disk is full or fails.
    """
    try:
        save_file(_apart(tensors), path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return sha256_file(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames in it survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(old, new)


def _discard(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot delete the temporary file %s: %s", path, error)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two sharing memory: what safetensors asks for."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """Put ``metadata`` into a safetensors header, sorted: the library writes it in an order that differs by run."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
