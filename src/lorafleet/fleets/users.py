"""One file of many users' rows, as a folder for each user: what is in one folder reaches that user's adapter only."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.config.fleet import UsersConfig
from lorafleet.data.reading import Record
from lorafleet.data.sources import find_source
from lorafleet.errors import DataError, did_you_mean
from lorafleet.files.atomic import write_text
from lorafleet.registry.names import LONGEST, name_fault

PLAIN, KEYED = "shared", "shared keyed"
"""Folders, and adapters, of everybody's rows: as they are, and with the user's key before the prompt."""

_PROMPTS = ("text", "prompt", "instruction")
"""Fields before whose content the key can stand."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Users:
    """Users and their rows.

    Attributes:
        folders: The folder of each user's rows, by name.
        keys: Each user's key, by name.
        left_out: Users without an adapter, and why.
        shared: Folders of everybody's rows, by ``PLAIN`` and ``KEYED``.
        labels: All labels that anybody gave; a user who never gave one could give it yet.
    """

    folders: dict[str, Path]
    keys: dict[str, str]
    left_out: dict[str, str]
    shared: dict[str, Path]
    labels: list[str]


def kind_of(name: str, users: Users | None) -> str:
    """Whether an adapter is a ``task``'s, a ``user``'s, or one that all users share."""
    if name in (PLAIN, KEYED):
        return "shared"
    return "user" if users is not None and name in users.keys else "task"


def split_users(config: UsersConfig, folder: Path, seed: int) -> Users:
    """Write each user's rows, and everybody's, into folders of their own.

    Rows for testing come from the test file; where there is none, a part of each user's rows, drawn by the seed.

    Args:
        config: Where the rows are, and whose they are.
        folder: For the folders.
        seed: Of the draw.

    Raises:
        DataError: The rows cannot be read, or no row has the key.
    """
    source = find_source(config.data)
    records = {name: [*split.records()] for name, split in source.splits.items()}
    _check_key(config, [record for split in records.values() for record in split])
    train, test = (_by_user(records.get(name, []), config.key) for name in ("train", "test"))
    names = _names([*train][: config.max_users])
    if not test:
        train, test = _held_out(train, config.held_out, seed)
    labels = {str(row["label"]) for split in (train, test) for rows in split.values() for row in rows if "label" in row}
    users = Users({}, {}, {}, {}, sorted(labels))
    for key, name in names.items():
        users.keys[name] = key
        mine, tested = train[key], test.get(key, [])
        if len(mine) < config.min_rows:
            users.left_out[name] = f"{len(mine)} training rows; min_rows is {config.min_rows}"
        elif not tested:
            users.left_out[name] = "no row to test on"
        else:
            users.folders[name] = _write(folder / _folder_name(name), mine, tested)
    if not users.folders:
        raise DataError(f"no user of {config.data} has enough rows: {_some(users.left_out)}")
    for kind in (PLAIN, KEYED):
        rows = [
            [
                _with_key(row, users.keys[name], kind)
                for name in users.folders
                for row in split.get(users.keys[name], [])
            ]
            for split in (train, test)
        ]
        users.shared[kind] = _write(folder / kind, *rows)
    return users


def keyed_folder(users: Users, name: str, folder: Path) -> Path:
    """A user's test rows with the key before the prompt: what the keyed shared adapter is measured on."""
    rows = [json.loads(line) for line in (users.folders[name] / "test.jsonl").read_text().splitlines()]
    keyed = [_with_key(row, users.keys[name], KEYED) for row in rows]
    return _write(folder / f"{_folder_name(name)}.keyed", keyed, keyed)


def _check_key(config: UsersConfig, records: list[Record]) -> None:
    fields = {field for record in records for field in record.row}
    if config.key not in fields:
        near = did_you_mean(config.key, fields)
        raise DataError(f"no row of {config.data} has the user key {config.key!r}; they have {_some(fields)}{near}")


def _by_user(records: list[Record], key: str) -> dict[str, Rows]:
    """Readable rows by user, in the order of the file; a row that cannot be read is nobody's.

    Raises:
        DataError: Rows cannot be read, or say not whose they are.
    """
    faults = [f"{r.source}: {r.fault or f'no {key!r}'}" for r in records if r.fault or r.row.get(key) in (None, "")]
    if faults:
        raise DataError(f"{len(faults)} rows have no user: {'; '.join(faults[:10])}")
    found: dict[str, Rows] = {}
    for record in records:
        found.setdefault(str(record.row[key]), []).append({k: v for k, v in record.row.items() if k != key})
    return found


def _names(keys: list[str]) -> dict[str, str]:
    """A name for each key: the key itself where it can be one, else made from it with a hash that keeps it apart."""
    names = {}
    for key in keys:
        name = key
        if name_fault(name):
            plain = re.sub(r"[^\w.\-+ ]+", "-", key).strip(" .-+")[: LONGEST - 9]
            name = f"{plain or 'user'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        names[key] = name
    return names


def _folder_name(name: str) -> str:
    """A name as a folder: names that differ in case only are one folder on some file systems."""
    return f"{name}.{hashlib.sha256(name.encode()).hexdigest()[:6]}" if name != name.lower() else name


def _held_out(train: Mapping[str, Rows], share: float, seed: int) -> tuple[dict[str, Rows], dict[str, Rows]]:
    kept, tested = dict[str, Rows](), dict[str, Rows]()
    for key, rows in train.items():
        digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        chosen = {*np.random.default_rng([seed, digest]).permutation(len(rows))[:count].tolist()}
        kept[key] = [row for number, row in enumerate(rows) if number not in chosen]
        tested[key] = [row for number, row in enumerate(rows) if number in chosen]
    return kept, tested


def _with_key(row: dict[str, Any], key: str, kind: str) -> dict[str, Any]:
    if kind == PLAIN:
        return row
    field = next((name for name in _PROMPTS if isinstance(row.get(name), str)), None)
    if field is not None:
        return row | {field: f"[{key}] {row[field]}"}
    messages = row.get("messages")
    if isinstance(messages, list) and (first := next((m for m in messages if m.get("role") == "user"), None)):
        changed = first | {"content": f"[{key}] {first['content']}"}
        return row | {"messages": [changed if one is first else one for one in messages]}
    return row


def _write(folder: Path, train: Rows, test: Rows) -> Path:
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl", "".join(lines))
    return folder


def _some(words: Any) -> str:
    found = [f"{name} ({why})" for name, why in words.items()] if isinstance(words, Mapping) else sorted(words)
    return ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
