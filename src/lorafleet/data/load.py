"""From a data configuration to tokenized splits: read, check, tokenize once, hold out, report."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorafleet.cache import cache_folder as default_cache_folder
from lorafleet.config.data import DataConfig
from lorafleet.data.build import build
from lorafleet.data.encode import ChatEncoder
from lorafleet.data.report import DataReport
from lorafleet.data.sources import find_source
from lorafleet.data.store import SCHEMA, TokenRows
from lorafleet.errors import DataError
from lorafleet.models.digest import remembered_sha256, sha256_json, tokenizer_hash

logger = logging.getLogger(__name__)

# Part of every cache key; count it up when the same rows would become other tokens.
_FORMAT = 2


@dataclass(frozen=True)
class Data:
    """Tokenized rows, ready to train and evaluate.

    Attributes:
        splits: Keys among train, valid and test. Without a valid file, valid was held out from train.
        task: ``label`` (text with a label), ``chat`` (any conversation) or ``text`` (plain text).
        labels: All labels of a label task, sorted.
        label_ids: Tokens of each label as the answer, with the end-of-turn token, in the order of ``labels``.
        report: What was read and what is trained.
        data_hash: Changes with any token or mask, and with their order or split.
        source_hash: Changes with any byte of the source's files, not with their names.
        chat_template: Jinja source of the template in use; it has to travel with the adapter.
        stop_ids: Tokens at which generation has to stop.
    """

    splits: dict[str, TokenRows]
    task: Literal["label", "chat", "text"]
    labels: tuple[str, ...]
    label_ids: tuple[tuple[int, ...], ...]
    report: DataReport
    data_hash: str
    source_hash: str
    chat_template: str
    stop_ids: tuple[int, ...]

    @property
    def train(self) -> TokenRows:
        """Rows to train on.

        Raises:
            DataError: There are none, as of data that are for testing alone.
        """
        if "train" not in self.splits:
            raise DataError(
                f"{self.report.data} has no rows to train on, only {', '.join(self.splits)}; add a train file"
            )
        return self.splits["train"]


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, cache_folder: Path | None = None) -> Data:
    """Read, check and tokenize rows, or take them from the cache when nothing changed.

    Args:
        config: Where the rows are and how they are used.
        tokenizer: The base model's.
        cache_folder: Where tokenized rows are kept; by default ``data`` in the cache folder.

    Raises:
        DataError: The source is not there or unreadable; rows cannot be used and ``on_bad_rows`` is ``error``; no row
            is left. The message lists the first ten bad rows and their count.
        ConfigError: A template or a knob does not fit these rows.
    """
    source = find_source(config.data)
    encoder = ChatEncoder(tokenizer, config)
    key = sha256_json(
        {
            "format": _FORMAT,
            "columns": str(SCHEMA),
            "source": source.content_hash,
            "config": config.model_dump(mode="json"),
            "tokenizer": tokenizer_hash(tokenizer),
            "template": encoder.template.source,
        }
    )
    parent = cache_folder or default_cache_folder() / "data"
    folder = parent / key[:32]
    if not _is_whole(folder):
        _fill(folder, lambda temporary: build(source, config, encoder, tokenizer, temporary))
    else:
        logger.info("%s: tokenized before, read from %s", source.title, folder)
    return _open(folder, encoder, source.bytes_hash)


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Build in a temporary folder and rename it, so that ``folder`` is whole or absent."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    except OSError as error:
        raise DataError(
            f"cannot write tokenized rows to {folder.parent}: {error.strerror}; name another folder in LORAFLEET_CACHE"
        ) from error
    try:
        write(temporary)
        if not _is_whole(folder):  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
    except OSError as error:
        if not _is_whole(folder):
            raise DataError(f"cannot write tokenized rows to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """True when the folder has a manifest and all files with the hashes it names."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return False
    try:
        files: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        damaged = [name for name, digest in files.items() if remembered_sha256(folder / name) != digest]
    except (ValueError, KeyError, OSError) as error:
        logger.warning("the tokenized rows in %s are damaged (%r) and are made again", folder, error)
        return False
    if damaged:
        logger.warning("the tokenized rows in %s are damaged (%s) and are made again", folder, ", ".join(damaged))
    return not damaged


def _open(folder: Path, encoder: ChatEncoder, source_hash: str) -> Data:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    splits = {}
    for name, (file, selection) in manifest["splits"].items():
        rows = None if selection is None else np.array(selection, dtype=np.int64)
        splits[name] = TokenRows(folder / file, rows)
    return Data(
        splits=splits,
        task=manifest["task"],
        labels=tuple(manifest["labels"]),
        label_ids=tuple(tuple(ids) for ids in manifest["label_ids"]),
        report=DataReport.model_validate(manifest["report"]),
        data_hash=manifest["data_hash"],
        source_hash=source_hash,
        chat_template=encoder.template.source,
        stop_ids=encoder.stop_ids,
    )
