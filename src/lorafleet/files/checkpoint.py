"""Checkpoints of a run: tensors and state, complete or not there at all.

output_dir/checkpoint-120/state.safetensors   tensors
                          state.json          everything else
                          manifest.json       size and SHA-256 of both, written last
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorafleet.errors import CheckpointError, raise_all
from lorafleet.files.atomic import json_bytes, sha256_file, sync_folder, write_new_file, write_new_tensors

logger = logging.getLogger(__name__)

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|deleted)")


def save_checkpoint(
    output_dir: str | os.PathLike[str], step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write ``checkpoint-<step>`` whole, or not at all.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done; names the checkpoint.
        tensors: Everything that is a tensor, of any device; shared memory is written twice.
        state: Everything else, in JSON's types; floats, NaN and infinity come back bit for bit.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or fails; checkpoints that were there are untouched.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    text = json.dumps(dict(state), indent=1).encode()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        digest = write_new_tensors(partial / TENSORS, tensors)
        write_new_file(partial / STATE, text)
        files = {
            TENSORS: {"bytes": (partial / TENSORS).stat().st_size, "sha256": digest},
            STATE: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        }
        write_new_file(partial / MANIFEST, json_bytes({"format": _FORMAT, "step": step, "files": files}))
        sync_folder(partial)
        _move_into_place(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # frees what it can; the error below tells the cause
        good = newest_checkpoint(output_dir)
        rest = f"{good.name} is still good" if good else "no earlier checkpoint is there"
        raise CheckpointError(f"cannot write {final}: {error.strerror or error}; {rest}") from error
    return final


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and verify every byte of it.

    Returns:
        The tensors, on the CPU, and the state.

    Raises:
        CheckpointError: A file is missing, damaged or changed; the message names every one.
    """
    path = Path(path)
    manifest = _manifest(path)
    faults = []
    for name in (TENSORS, STATE):
        file, wanted = path / name, manifest["files"][name]
        if not file.is_file():
            faults.append(f"{file} is missing")
        elif file.stat().st_size != wanted["bytes"]:
            faults.append(f"{file} has {file.stat().st_size} bytes; {wanted['bytes']} were written")
        elif sha256_file(file) != wanted["sha256"]:
            faults.append(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")
    if faults:
        faults[-1] += f"; delete {path} to resume from the checkpoint before it"
    raise_all(CheckpointError, faults, f"{path} is damaged")
    try:
        state = json.loads((path / STATE).read_text())
        return load_file(path / TENSORS), state
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step, or ``None``; what a crash left incomplete is passed over."""
    complete = _complete(Path(output_dir))
    return complete[max(complete)] if complete else None


def prune_checkpoints(output_dir: str | os.PathLike[str], keep: int, protect: Collection[int] = ()) -> list[Path]:
    """Delete old checkpoints, and what crashes left behind. Folders that lorafleet did not write are left alone.

    Args:
        output_dir: The run's folder.
        keep: How many of the newest complete checkpoints stay; 1 at least.
        protect: Steps whose checkpoints stay as well, for example the best one.

    Returns:
        The checkpoints that were deleted. One that cannot be deleted is named in a warning, and stays.
    """
    output_dir = Path(output_dir)
    complete = _complete(output_dir)
    stay = {*sorted(complete)[-max(keep, 1) :], *protect}
    old = [path for step, path in sorted(complete.items()) if step not in stay]
    superseded = [path for path in output_dir.glob("checkpoint-*.replaced") if path not in complete.values()]
    leftovers = [path for path in output_dir.glob(".checkpoint-*") if _LEFTOVER.fullmatch(path.name)]
    deleted = []
    for path in [*old, *superseded, *leftovers]:
        try:
            _delete(path)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", path, error)
            continue
        if path in old:
            deleted.append(path)
    return deleted


def _delete(path: Path) -> None:
    """Delete a folder; renamed first, so that a crash on the way leaves no part of it under its name."""
    trash = path if path.name.startswith(".") else path.with_name(f".{path.name.removesuffix('.replaced')}.deleted")
    if trash != path:
        if trash.exists():
            shutil.rmtree(trash)
        path.rename(trash)
    shutil.rmtree(trash)


def _move_into_place(partial: Path, final: Path) -> None:
    """Rename a finished checkpoint; one of the same step steps aside until the new one is in place."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.replace(final, replaced)
    try:
        os.replace(partial, final)
        sync_folder(final.parent)
    except OSError:
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def _complete(output_dir: Path) -> dict[int, Path]:
    """Complete checkpoints by step; ``.replaced`` ones count where their successor never arrived."""
    found: dict[int, Path] = {}
    if not output_dir.is_dir():
        return found
    for path in sorted(output_dir.iterdir(), reverse=True):  # "checkpoint-5" after "checkpoint-5.replaced"
        match = _NAME.fullmatch(path.name)
        if match and _is_complete(path):
            found[int(match[1])] = path
    return found


def _is_complete(path: Path) -> bool:
    try:
        files = _manifest(path)["files"]
    except CheckpointError as error:
        logger.info("passing over %s: %s", path.name, error)
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == files[name]["bytes"] for name in files)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        what = "has no manifest.json, so it was never finished" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}")
    try:
        manifest = json.loads(file.read_bytes())
        entries = {
            name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in (TENSORS, STATE)
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if manifest.get("format") != _FORMAT or len(entries) != len(manifest["files"]):
        raise CheckpointError(f"{file} has format {manifest.get('format')!r}; this release reads format {_FORMAT}")
    return dict(manifest)
