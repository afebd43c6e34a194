"""What of an adapter's folder the registry keeps, and what it writes down about it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafleet.errors import AdapterError
from lorafleet.files.adapter import CONFIG, WEIGHTS, Adapter
from lorafleet.files.adapter_tensors import adapted_modules
from lorafleet.files.deployability import deployability
from lorafleet.files.manifest import MANIFEST, read_file
from lorafleet.files.method import METHOD, METHOD_WEIGHTS, SavedMethod, load_saved
from lorafleet.files.run_folder import SETTINGS, TEMPLATE, TOKENIZER
from lorafleet.models.digest import sha256_json

KEPT = (CONFIG, WEIGHTS, METHOD, METHOD_WEIGHTS, MANIFEST, SETTINGS, TEMPLATE, *TOKENIZER)
"""Files of a revision. The rest of a run's folder (logs, plots, checkpoints, the card) is about the run."""


def read_contents(folder: Path) -> tuple[dict[str, bytes], dict[str, Any], dict[str, float]]:
    """The files of an adapter to keep, after it was checked as loading would, its lineage, and its training's scores.

    Raises:
        AdapterError: It is no adapter, or a file of it is missing, damaged, pickled or a link out of the folder.
    """
    adapter = load_saved(folder)
    contents = {name: read_file(folder, name) for name in KEPT if (folder / name).exists()}
    scores = {name: value for name, value in adapter.metadata.get("metrics", {}).items() if value is not None}
    return contents, _lineage(folder, adapter, contents), scores


def revision_of(files: Mapping[str, str]) -> str:
    """The name of a revision: a hash of its files' names and hashes."""
    return sha256_json(dict(files))


def hashes(contents: Mapping[str, bytes]) -> dict[str, str]:
    """The SHA-256 of each file."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def _lineage(folder: Path, adapter: Adapter | SavedMethod, contents: Mapping[str, bytes]) -> dict[str, Any]:
    metadata = adapter.metadata
    template = contents.get(TEMPLATE)
    return {
        "method": "lora" if isinstance(adapter, Adapter) else adapter.kind,
        "base": adapter.base_name,
        "base_revision": adapter.base_revision,
        "base_weights_hash": metadata.get("base_weights_hash"),
        "tokenizer_hash": metadata.get("tokenizer_hash"),
        "template_hash": hashlib.sha256(template).hexdigest() if template is not None else None,
        "data": metadata.get("data", {}).get("data"),
        "data_hash": metadata.get("data_hash"),
        "steps": metadata.get("steps"),
        "run": folder.resolve().name,
        "deployable": _deployable(adapter),
    }


def _deployable(adapter: Adapter | SavedMethod) -> dict[str, list[str]]:
    """The reasons against each runtime; none where it can serve the adapter."""
    if isinstance(adapter, Adapter):
        return deployability(adapter.config, adapted_modules(adapter.tensors))
    only = [f"it serves LoRA adapters; this is {adapter.kind}"]
    peft = [f"PEFT has no {adapter.kind}"] if adapter.kind in ("bottleneck", "bitfit") else []
    return {"peft": peft, "vllm": only, "llama.cpp": only}


def check_file_names(files: Mapping[str, Any]) -> None:
    """Refuse a revision from elsewhere whose files would not be an adapter's.

    Raises:
        AdapterError: Names are unknown; they could lead out of a folder.
    """
    if unknown := [name for name in files if name not in KEPT]:
        raise AdapterError(f"a revision has no files {', '.join(map(repr, unknown))}")
