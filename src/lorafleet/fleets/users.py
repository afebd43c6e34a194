"""One file of many users' rows, as a folder for each user: what is in one folder reaches that user's adapter only."""

import hashlib
import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.config.data import DataConfig
from lorafleet.config.fleet import UsersConfig
from lorafleet.data.conversation import BadRow, Conversation, Labelled, Row, fingerprint, opening
from lorafleet.data.reading import Record
from lorafleet.data.shapes import convert_row, detect_shape
from lorafleet.data.sources import find_source
from lorafleet.errors import CheckpointError, DataError, did_you_mean
from lorafleet.files.atomic import write_bytes
from lorafleet.registry.names import LONGEST, name_fault

logger = logging.getLogger(__name__)

PLAIN, KEYED = "shared", "shared keyed"
"""Folders, and adapters, of everybody's rows: as they are, and with the user's key before the prompt."""

ROWS = "rows"
"""The folder of all these folders, in the run's own."""

_MARK = ".lorafleet-rows"
"""A file that says that a fleet made the folder, and may make it anew."""


@dataclass(frozen=True)
class UserRow:
    """One row.

    Attributes:
        fields: As it was read, without the user.
        row: What it is to the loader; None where it cannot be used.
    """

    fields: dict[str, Any]
    row: Row | None


UserRows = list[UserRow]


@dataclass(frozen=True)
class Users:
    """Users and their rows.

    Attributes:
        folders: The folder of each user's rows, by name.
        keys: Each user's key, by name.
        left_out: Users without an adapter, and why; ``KEYED`` too where rows have no prompt.
        shared: Folders of everybody's rows, by ``PLAIN`` and ``KEYED``, those that were asked for.
        keyed: Of each user, by name: the test rows with the key before the prompt.
        labels: All labels that anybody gave; a user who never gave one could give it yet.
    """

    folders: dict[str, Path]
    keys: dict[str, str]
    left_out: dict[str, str]
    shared: dict[str, Path]
    keyed: dict[str, Path]
    labels: list[str]


def kind_of(name: str, users: Users | None) -> str:
    """Whether an adapter is a ``task``'s, a ``user``'s, or one that all users share."""
    if name in (PLAIN, KEYED):
        return "shared"
    return "user" if users is not None and name in users.keys else "task"


def clear_rows(folder: Path) -> None:
    """Make an empty folder for the rows, in the place of an earlier fleet's.

    Raises:
        CheckpointError: The folder holds what no fleet has put there, or cannot be replaced.
    """
    there = [path for path in folder.glob("*") if not path.name.startswith(".")]
    if there and not (folder / _MARK).exists():
        raise CheckpointError(
            f"{folder} is where the users' rows go, and was not made by a fleet; move it away, delete it if a fleet of "
            "an earlier release made it, or choose another output_dir"
        )
    try:
        write_bytes(folder / _MARK, b"")  # first, and it stays: a fleet that is killed here may go on
        for path in there:
            shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made anew: {error.strerror or error}") from error


def split_users(
    config: UsersConfig,
    folder: Path,
    seed: int,
    data: DataConfig | None = None,
    kinds: Collection[str] = (PLAIN, KEYED),
) -> Users:
    """Write each user's rows, and everybody's, into folders of their own.

    Rows for testing come from the test file; where there is none, a part of each user's rows, drawn by the seed.

    Args:
        config: Where the rows are, and whose they are.
        folder: For the folders.
        seed: Of the draw.
        data: How rows are read: their shape, and what becomes of those that cannot be used.
        kinds: Which folders of everybody's rows are wanted.

    Raises:
        DataError: The rows cannot be read or have no known shape, no row has the key, or some have none.
    """
    data = data or DataConfig(data=config.data)
    source = find_source(config.data)
    records = {name: [*split.records()] for name, split in source.splits.items()}
    _check_key(config, [record for split in records.values() for record in split])
    given = {name: records.get(name, []) for name in ("train", "test")}
    given = _with_a_user(given, config, data.on_bad_rows == "skip")
    shape = _shape([*given["train"], *given["test"]], config.key, data.data_format)
    train, test = (_by_user(split, config.key, shape) for split in given.values())
    names = _names([*train][: config.max_users])
    if not test:
        train, test = _held_out(train, config.held_out, seed)
    read = [row.row for split in (train, test) for rows in split.values() for row in rows]
    labels = {row.label for row in read if isinstance(row, Labelled)}
    users = Users({}, {}, {}, {}, {}, sorted(labels))
    for key, name in names.items():
        users.keys[name] = key
        mine, tested = train[key], test.get(key, [])
        if len(mine) < config.min_rows:
            users.left_out[name] = f"{len(mine)} training rows; min_rows is {config.min_rows}"
        elif not tested:
            users.left_out[name] = "no row to test on"
        else:
            users.folders[name] = _write(folder / folder_name(name), _fields(mine), _fields(tested))
    if not users.folders:
        raise DataError(f"no user of {config.data} has enough rows: {_some(users.left_out)}")
    chosen = {name: (train[users.keys[name]], test[users.keys[name]]) for name in users.folders}
    _write_shared(users, chosen, folder, kinds, shape)
    return users


def folder_name(name: str) -> str:
    """A name as a folder: names that differ in case only are one folder on some file systems."""
    return f"{name}.{hashlib.sha256(name.encode()).hexdigest()[:6]}" if name != name.lower() else name


def _write_shared(
    users: Users,
    chosen: Mapping[str, tuple[UserRows, UserRows]],
    folder: Path,
    kinds: Collection[str],
    shape: str,
) -> None:
    """Write the folders of everybody's rows that are wanted."""
    if PLAIN in kinds:
        rows = ([field for one in chosen.values() for field in _fields(one[split])] for split in (0, 1))
        users.shared[PLAIN] = _write(folder / PLAIN, *rows)
    if KEYED in kinds and shape == "text":
        users.left_out[KEYED] = "plain text has no prompt that the user's key could stand before"
    elif KEYED in kinds:
        keyed = {
            name: [[_with_key(row.row, users.keys[name]) for row in split] for split in one]
            for name, one in chosen.items()
        }
        rows = ([row for one in keyed.values() for row in one[split]] for split in (0, 1))
        users.shared[KEYED] = _write(folder / KEYED, *rows)
        for name, (_, tested) in keyed.items():  # below a folder that no user can have
            users.keyed[name] = _write(folder / KEYED / "users" / folder_name(name), tested, tested)


def _check_key(config: UsersConfig, records: Iterable[Record]) -> None:
    fields = {field for record in records for field in record.row}
    if fields and config.key not in fields:
        near = did_you_mean(config.key, fields)
        raise DataError(f"no row of {config.data} has the user key {config.key!r}; they have {_some(fields)}{near}")


def _with_a_user(splits: Mapping[str, Sequence[Record]], config: UsersConfig, skip: bool) -> dict[str, list[Record]]:
    """The rows that can be read and say whose they are.

    Raises:
        DataError: Some do not, and they are not to be skipped.
    """
    faults, found = list[str](), dict[str, list[Record]]()
    for name, records in splits.items():
        found[name] = []
        for record in records:
            nobodys = record.fault or (f"no {config.key!r}" if record.row.get(config.key) in (None, "") else None)
            if nobodys:
                faults.append(f"{record.source}: {nobodys}")
            else:
                found[name].append(record)
    told = f"{len(faults)} rows of {config.data} cannot be given to a user: {'; '.join(faults[:10])}"
    if faults and not skip:
        raise DataError(f"{told}. Mend them, or leave them out with on_bad_rows: skip under defaults")
    if faults:
        logger.warning("%s; they are left out", told)
    return found


def _shape(records: Sequence[Record], key: str, data_format: str) -> str:
    """The shape of the rows, which are one data set whoever they belong to."""
    if data_format != "auto" or not records:
        return data_format
    return detect_shape((record.source, _without(record.row, key)) for record in records)


def _by_user(records: Iterable[Record], key: str, shape: str) -> dict[str, UserRows]:
    """Rows by user, in the order of the file."""
    found: dict[str, UserRows] = {}
    for record in records:
        fields = _without(record.row, key)
        try:
            row = convert_row(shape, fields)
        except BadRow:
            row = None  # why, is told when the rows of its user are loaded
        found.setdefault(str(record.row[key]), []).append(UserRow(fields, row))
    return found


def _without(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def _names(keys: Iterable[str]) -> dict[str, str]:
    """A name for each key: the key itself where it can be one, else made from it with a hash that keeps it apart."""
    names = {}
    for key in keys:
        name = key
        if name_fault(name) or name.lower() in (PLAIN, KEYED):  # adapters of everybody's rows have these names
            plain = re.sub(r"[^\w.\-+ ]+", "-", key).strip(" .-+")[: LONGEST - 9]
            name = f"{plain or 'user'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        names[key] = name
    return names


def _held_out(
    train: Mapping[str, UserRows], share: float, seed: int
) -> tuple[dict[str, UserRows], dict[str, UserRows]]:
    """A part of each user's rows; no question is on both sides where whole questions fit into it, as in the loader."""
    kept, tested = dict[str, UserRows](), dict[str, UserRows]()
    for user, rows in train.items():
        digest = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8])
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        # Rows that cannot be used ask nothing; each is one of its own.
        questions = [opening(one.row) if one.row else number for number, one in enumerate(rows)]
        prints = [fingerprint(one.row) if one.row else number for number, one in enumerate(rows)]
        draws = (_draw(groups, count, [seed, digest]) for groups in (questions, prints, range(len(rows))))
        chosen = next((found for found in draws if found), set[int]())
        kept[user] = [row for number, row in enumerate(rows) if number not in chosen]
        tested[user] = [row for number, row in enumerate(rows) if number in chosen]
    return kept, tested


def _draw(keys: Sequence[Hashable], count: int, seed: list[int]) -> set[int]:
    """Rows of whole groups in a drawn order, passing over groups that no longer fit."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    members, chosen = list(groups.values()), set[int]()
    for group in np.random.default_rng(seed).permutation(len(members)):
        if len(chosen) + len(members[group]) <= count:
            chosen.update(members[group])
    return chosen


def _with_key(row: Row | None, key: str) -> dict[str, Any]:
    """A row with the key before its first question; for one that cannot be used an empty row, which is none either."""
    if isinstance(row, Labelled):
        return {"text": f"[{key}] {row.text}", "label": row.label}
    if not isinstance(row, Conversation):
        return {}
    turns = [{"role": one.role, "content": one.content, "weight": int(one.trained)} for one in row.turns]
    # Where nobody asks, before what else comes ahead of the answer; before an answer it would be trained.
    ahead = (turn for role in ("user", "system", "tool") for turn in turns if turn["role"] == role)
    if first := next(ahead, None):
        first["content"] = f"[{key}] {first['content']}"
    return {"messages": turns, "references": list(row.references), "answer": row.answer}


def _fields(rows: Iterable[UserRow]) -> list[dict[str, Any]]:
    return [row.fields for row in rows]


def _write(folder: Path, train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]]) -> Path:
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False, default=_no_text) + "\n" for row in rows)
        # Half of a surrogate pair, which UTF-8 has no form for, stays the escape that it was.
        write_bytes(folder / f"{name}.jsonl", text.encode("utf-8", "backslashreplace"))
    return folder


def _no_text(value: object) -> dict[str, str]:
    """What JSON has no form for, as an object, which no shape takes for text either: a date must not become a label."""
    return {type(value).__name__: str(value)}


def _some(words: Any) -> str:
    found = [f"{name} ({why})" for name, why in words.items()] if isinstance(words, Mapping) else sorted(words)
    return (", ".join(found[:5]) + (", …" if len(found) > 5 else "")) or "there is none"
