"""What a base is, as a hash: files, tokenizer. A run resumed on another base must be refused, so these are exact."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.cache import cache_folder
from lorafleet.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A file changed this recently may change again within the clock's resolution; its digest is not remembered.
_SETTLED_SECONDS = 2.0


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of a JSON value; the order of keys does not matter.

    Raises:
        TypeError: ``value`` holds something that JSON has no form for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def remembered_sha256(path: Path) -> str:
    """``sha256_file``, remembered in the cache folder until the file's size, times or inode change."""
    path = path.resolve()
    state = path.stat()
    key = [str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    note = cache_folder() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    if note.exists():
        try:
            known = json.loads(note.read_text())
        except ValueError:
            known = None  # a note cut short by a crash; it is written again below
        if isinstance(known, dict) and known.get("key") == key:
            return str(known["sha256"])
    digest = sha256_file(path)
    if time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED_SECONDS:
        _remember(note, {"key": key, "sha256": digest})
    return digest


def _remember(note: Path, entry: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        os.replace(temporary, note)
    except OSError as error:
        logger.info("cannot remember a file's hash in %s (%s); it is computed again next time", note.parent, error)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in a Hugging Face folder, in a fixed order.

    Raises:
        ModelError: The index names a file that is absent or outside the folder, or there are no weights.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}; download or copy the model again") from error
    bad = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if bad:
        raise ModelError(f"{index} names files that are not in the folder: {', '.join(map(repr, bad))}")
    return [folder / name for name in names]


def weights_hash(files: Iterable[Path]) -> str:
    """One hash for a model's files (weights and ``config.json``): names and contents, wherever the folder lies."""
    return sha256_json({path.name: remembered_sha256(path) for path in files})


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """One hash for all that decides which ids a text or a chat becomes: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    rest = json.dumps({"special": special, "chat_template": tokenizer.chat_template}, ensure_ascii=False)
    if backend is None:
        return _rules_hash(json.dumps(tokenizer.get_vocab(), ensure_ascii=False), rest, ())
    # State of the last call, not part of what the tokenizer is.
    return _rules_hash(backend.to_str(), rest, ("truncation", "padding"))


@lru_cache(maxsize=2)  # a fleet asks at the data of each user, and it takes a third of a second
def _rules_hash(rules: str, rest: str, without: tuple[str, ...]) -> str:
    kept = {name: part for name, part in json.loads(rules).items() if name not in without}
    return sha256_json({"rules": kept, **json.loads(rest)})
