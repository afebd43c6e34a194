"""Files to rows: JSON Lines, JSON, CSV, TSV, Parquet, each row with its place, each fault with its reason."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lorafleet.data.conversation import describe
from lorafleet.data.lines import MAX_ROW_BYTES, TOO_LONG, Line, not_utf8, read_lines
from lorafleet.errors import DataError, did_you_mean

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_SPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """One row as read.

    Attributes:
        source: ``file:line`` from 1; in Parquet ``file:row``, in a JSON list with the item's number behind it.
        row: Its fields; empty when there is a fault.
        fault: Why the row cannot be read.
    """

    source: str
    row: dict[str, Any]
    fault: str | None = None


def read_records(path: Path, name: str) -> Iterator[Record]:
    """Yield the rows of a file in order.

    Args:
        path: A file with one of the known suffixes, or that and ``.gz``.
        name: How the file is called in a row's place.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    return _READERS[file_suffix(path)](path, name)


def file_suffix(path: Path) -> str:
    """The suffix that decides how a file is read, without ``.gz``.

    Raises:
        DataError: No reader knows it.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in _READERS:
        raise DataError(
            f"{path}: the suffix {suffix or '(none)'} is not known; rows are read from "
            f"{', '.join(_READERS)}, all but Parquet also as .gz{did_you_mean(suffix, _READERS)}"
        )
    if path.name.lower().endswith(".parquet.gz"):
        raise DataError(f"{path}: Parquet is compressed inside and cannot be read gzipped; run gunzip on it")
    return suffix


def is_data_file(path: Path) -> bool:
    """True for a visible file whose suffix a reader knows."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return path.is_file() and suffix in _READERS and not path.name.startswith(".")


def _read_json_lines(path: Path, name: str) -> Iterator[Record]:
    empty: list[int] = []
    for line in read_lines(path):
        if not line.text.strip() and line.fault is None:
            empty.append(line.number)
            continue
        # Only now is it known that the empty lines were not the file's end.
        yield from (Record(f"{name}:{number}", {}, "the line is empty") for number in empty)
        empty.clear()
        yield _parse(line, f"{name}:{line.number}")


def _parse(line: Line, source: str) -> Record:
    if line.fault is not None:
        return Record(source, {}, line.fault)
    if (at := line.text.find("\x00")) >= 0:
        return Record(source, {}, f"a NUL character at column {at + 1}; the file may be damaged")
    try:
        row = json.loads(line.text)
    except json.JSONDecodeError as error:
        return Record(source, {}, f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return Record(source, {}, "broken JSON: nested too deeply")
    except ValueError as error:  # a number with thousands of digits
        return Record(source, {}, f"broken JSON: {error}")
    return _as_record(row, source)


def _as_record(row: Any, source: str) -> Record:
    if not isinstance(row, dict):
        return Record(source, {}, f"a row is an object such as {{…}}, not {describe(row)}")
    if not row:
        return Record(source, {}, "the row is empty: {}")
    return Record(source, row)


def _read_json(path: Path, name: str) -> Iterator[Record]:
    """A list of objects, one object, or JSON Lines under the wrong name."""
    # A list may stand in one line, however long; its items are the rows.
    first = next((line for line in read_lines(path, limit=None) if line.text.strip() or line.fault), None)
    if first is None:
        raise DataError(f"{path} has no rows, only empty lines")
    if first.text.lstrip().startswith("["):
        return _read_json_list(path, name)
    if (
        first.fault is None
        and _parse(first, "").fault
        and (whole := _parse(Line(1, _whole_text(path)), "")).fault is None
    ):
        return iter([whole._replace(source=f"{name}:{first.number}")])
    return _read_json_lines(path, name)


def _read_json_list(path: Path, name: str) -> Iterator[Record]:
    text, decoder = _whole_text(path), json.JSONDecoder()
    number, counted, item = 1, 0, 0

    def skip_space(at: int) -> int:
        found = _SPACE.match(text, at)
        return found.end() if found else at

    at = skip_space(skip_space(0) + 1)
    while not text.startswith("]", at):
        number, counted, item, start = number + text.count("\n", counted, at), at, item + 1, at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken_list(path, error.msg.removesuffix(" at"), error.lineno, error.colno) from error
        except RecursionError as error:
            raise _broken_list(path, "nested too deeply", number, 1) from error
        except ValueError as error:
            raise _broken_list(path, str(error), number, 1) from error
        source = f"{name}:{number} (item {item})"
        yield Record(source, {}, TOO_LONG) if at - start > MAX_ROW_BYTES else _as_record(row, source)
        at = skip_space(at)
        if text.startswith(",", at):
            at = skip_space(at + 1)
        elif not text.startswith("]", at):
            raise _broken_list(path, "',' or ']' is missing", text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
    if end := text[skip_space(at + 1) :]:
        raise _broken_list(path, f"{end[:20]!r} after the end of the list", text.count("\n", 0, at) + 1, 1)


def _broken_list(path: Path, reason: str, line: int, column: int) -> DataError:
    return DataError(
        f"{path}:{line}: broken JSON: {reason} at column {column}; what follows in the list cannot be read. "
        "Mend it, or write one object a line (.jsonl), where a broken row costs only itself"
    )


def _whole_text(path: Path) -> str:
    lines = []
    for line in read_lines(path, limit=None):
        if line.fault:
            raise DataError(f"{path}:{line.number}: {line.fault}")
        lines.append(line.text)
    return "\n".join(lines)


def _read_table(path: Path, name: str, delimiter: str) -> Iterator[Record]:
    """CSV or TSV with a header line, quoted as RFC 4180 says."""
    if csv.field_size_limit() < MAX_ROW_BYTES:  # the module's own limit would refuse long texts
        csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_table_lines(path), delimiter=delimiter, strict=True)
    header = _read_header(reader, path, delimiter)
    empty: list[int] = []
    start = reader.line_num + 1
    while True:
        source, cells, fault = f"{name}:{start}", [], None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _quote_fault(str(error), start, reader.line_num)
        if fault is None and len(cells) < 2 and not "".join(cells).strip():
            empty.append(start)
        else:
            yield from (Record(f"{name}:{number}", {}, "the line is empty") for number in empty)
            empty.clear()
            yield Record(source, {}, fault) if fault else _table_record(header, cells, source)
        start = reader.line_num + 1


def _table_lines(path: Path) -> Iterator[str]:
    for line in read_lines(path):
        if line.fault and not line.text:  # too long; its end, and with it the row's, is unknown
            raise DataError(f"{path}:{line.number}: {line.fault}")
        yield line.text + "\n"


def _read_header(reader: Any, path: Path, delimiter: str) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: the header cannot be read: {error}") from error
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}:1: the header names {', '.join(map(repr, twice))} twice; give every column its own name"
        )
    if not header or header == [""]:
        raise DataError(f"{path}:1: the header line with the column names is empty")
    if len(header) == 1 and (
        found := next((mark for mark in ";\t|," if mark != delimiter and mark in header[0]), None)
    ):
        raise DataError(
            f"{path}:1: the columns are separated by {found!r}, not by {delimiter!r}; "
            + ("name the file .tsv" if found == "\t" else "write it again with commas")
        )
    return header


def _quote_fault(reason: str, start: int, end: int) -> str:
    if "unexpected end of data" in reason:
        return f"a quote that opens here is never closed, so lines {start} to {end} were read as one row"
    return f"broken quoting: {reason}"


def _table_record(header: list[str], cells: list[str], source: str) -> Record:
    for cell in cells:
        if found := _ESCAPED_BYTE.search(cell):
            return Record(
                source, {}, not_utf8(ord(found.group()) - 0xDC00, found.start() + 1).replace("line", "cell", 1)
            )
    if len(cells) != len(header):
        return Record(
            source, {}, f"{len(cells)} cells where the header has {len(header)}; is a cell with a comma unquoted?"
        )
    if not any(cell.strip() for cell in cells):
        return Record(source, {}, "all cells are empty")
    return Record(source, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in _batch_rows(batch):
                    number += 1
                    source = f"{name}:{number}"
                    yield Record(source, {}, row) if isinstance(row, str) else _as_record(row, source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet after row {number}: {str(error).splitlines()[0]}") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of an Arrow batch; for one with text that is not UTF-8, the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"a text is not UTF-8: byte 0x{error.object[error.start]:02X}"


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": lambda path, name: _read_table(path, name, ","),
    ".tsv": lambda path, name: _read_table(path, name, "\t"),
    ".parquet": _read_parquet,
}
