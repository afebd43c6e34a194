"""Tokenize a source into a folder: every row is trained, held out, or rejected with its place and reason."""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorafleet.config.data import DataConfig
from lorafleet.data.conversation import BadRow, Conversation, Labelled, PlainText, fingerprint, opening
from lorafleet.data.encode import ChatEncoder
from lorafleet.data.holdout import choose_held_out
from lorafleet.data.plan import Plan, make_plan, records_of
from lorafleet.data.reading import Record
from lorafleet.data.report import Outcome
from lorafleet.data.shapes import convert_row
from lorafleet.data.sources import SPLITS, Source
from lorafleet.data.store import RowWriter, TokenRows
from lorafleet.data.summary import summarize
from lorafleet.errors import DataError
from lorafleet.models.digest import sha256_file, sha256_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ROWS_AT_ONCE = 512
_LISTED_REJECTIONS = 10
_SECONDS_BETWEEN_LINES = 10.0


def build(
    source: Source, config: DataConfig, encoder: ChatEncoder, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Tokenize all splits of a source and write them, with a manifest that holds the report, into ``folder``.

    Raises:
        DataError: A file is unreadable, or rows cannot be used and ``on_bad_rows`` is ``error``, or none is left.
        ConfigError: A knob does not fit rows of this shape.
    """
    plan = make_plan(source, config)
    outcomes = {}
    for name, split in source.splits.items():
        with RowWriter(folder / f"{name}.arrow") as writer:
            outcomes[name] = _write_split(records_of(split, config), plan, encoder, writer, name)
    _check(source, config, outcomes)
    places = _place(folder, config, outcomes)
    rows = {name: TokenRows(folder / file, _array(selection)) for name, (file, selection) in places.items()}
    report = summarize(source, config, plan, encoder, tokenizer, rows, outcomes)
    manifest = {
        "task": plan.task,
        "labels": plan.labels,
        "label_ids": encoder.answer_ids(plan.labels),
        "splits": places,
        "report": report.model_dump(mode="json"),
        "data_hash": sha256_json([{name: outcome.content for name, outcome in outcomes.items()}, places]),
        "files": {f"{name}.arrow": sha256_file(folder / f"{name}.arrow") for name in outcomes},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")


def _write_split(records: Iterable[Record], plan: Plan, encoder: ChatEncoder, writer: RowWriter, name: str) -> Outcome:
    outcome, seen = Outcome(), set[bytes]()
    started = told = time.monotonic()
    for chunk in _chunks(records, _ROWS_AT_ONCE):
        outcome.read += len(chunk)
        rows = [_prepare(record, plan) for record in chunk]
        results = iter(encoder.encode_rows([row.row for row in rows if not isinstance(row, BadRow)]))
        written = []
        for record, row in zip(chunk, rows, strict=True):
            samples = row if isinstance(row, BadRow) else next(results)
            if isinstance(row, BadRow) or isinstance(samples, BadRow):
                outcome.reject(record.source, str(samples))
            else:
                written.append((record.source, samples, row.fingerprint in seen, row.fingerprint, row.opening))
                seen.add(row.fingerprint)
        writer.write(written)
        if (now := time.monotonic()) - told > _SECONDS_BETWEEN_LINES:
            told = now
            logger.info("tokenized %d rows of %s, %.0f a second", outcome.read, name, outcome.read / (now - started))
    outcome.content = writer.content.hexdigest()
    return outcome


class _Prepared(NamedTuple):
    """A row before it is tokenized."""

    row: Conversation | PlainText
    fingerprint: bytes
    opening: bytes


def _prepare(record: Record, plan: Plan) -> _Prepared | BadRow:
    if record.fault is not None or plan.shape is None:
        return BadRow(record.fault)
    if plan.detected and plan.shape == "text" and record.row.get("label") is not None:
        return BadRow("a label, where most rows have text alone; data_format says which is meant: text_label or text")
    try:
        row = convert_row(plan.shape, record.row)
    except BadRow as fault:
        return fault
    ready = plan.prompt.conversation(row) if isinstance(row, Labelled) and plan.prompt else row
    assert not isinstance(ready, Labelled)
    return _Prepared(ready, fingerprint(row), opening(row))


def _check(source: Source, config: DataConfig, outcomes: dict[str, Outcome]) -> None:
    """Stop at bad rows, or at splits without rows."""
    read = sum(outcome.read for outcome in outcomes.values())
    rejected = sum(outcome.rejected for outcome in outcomes.values())
    none_left = [name for name, outcome in outcomes.items() if outcome.rejected == outcome.read]
    if rejected and (config.on_bad_rows == "error" or none_left):
        first = [item for outcome in outcomes.values() for item in outcome.rejections][:_LISTED_REJECTIONS]
        lines = [f"  {item.source}: {item.reason}" for item in first]
        if rejected > len(first):
            lines.append(f"  … and {rejected - len(first)} more")
        remedy = (
            f"No usable row is left in {', '.join(none_left)}."
            if none_left
            else "Mend them, or leave them out with on_bad_rows=skip (--on-bad-rows skip)."
        )
        raise DataError(
            f"{rejected:,} of {read:,} rows of {source.title} cannot be used:\n" + "\n".join([*lines, remedy])
        )
    if none_left:
        files = [str(path) for name in none_left for path in source.splits[name].files.values()]
        raise DataError(f"there are no rows in {', '.join(files) or ', '.join(none_left)}")


Place = tuple[str, list[int] | None]


def _place(folder: Path, config: DataConfig, outcomes: dict[str, Outcome]) -> dict[str, Place]:
    """For each split its file and which of the file's samples belong to it; None is all."""
    places: dict[str, Place] = {name: (f"{name}.arrow", None) for name in outcomes}
    if "train" in places and "valid" not in places and config.valid_fraction > 0:
        whole = TokenRows(folder / "train.arrow")
        first = np.array(whole.column("first"), dtype=bool)
        if first.sum() > 1:
            starts = np.flatnonzero(first)
            openings, prints = whole.column("opening"), whole.column("fingerprint")
            chosen = choose_held_out([openings[i] for i in starts], [prints[i] for i in starts], config.valid_fraction)
            held_out = np.isin(np.cumsum(first) - 1, chosen)
            places["train"] = ("train.arrow", np.flatnonzero(~held_out).tolist())
            places["valid"] = ("train.arrow", np.flatnonzero(held_out).tolist())
    return {name: places[name] for name in SPLITS if name in places}


def _array(selection: list[int] | None) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    return None if selection is None else np.array(selection, dtype=np.int64)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
