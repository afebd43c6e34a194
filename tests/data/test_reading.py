"""Files of every kind: rows with their places, faults with their reasons."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorafleet.data.lines import MAX_ROW_BYTES
from lorafleet.data.reading import Record, file_suffix, read_records
from lorafleet.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei, drei"}, {"text": '第三\n行 "quoted"'}]


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path) -> list[Record]:
    return list(read_records(path, path.name))


def json_lines(rows: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def csv_text(delimiter: str) -> str:
    return f'text{delimiter}n\none{delimiter}1\n"zwei, drei"{delimiter}2\n"第三\n行 ""quoted"""{delimiter}3\n'


def write_rows(path: Path) -> Path:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        data = json_lines(ROWS)
    elif name.endswith(".json"):
        data = json.dumps(ROWS, indent=2, ensure_ascii=False).encode()
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path
    else:
        data = csv_text("," if name.endswith(".csv") else "\t").encode()
    return write(path, gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ["1", "2", "3"]),
        ("a.ndjson", ["1", "2", "3"]),
        ("a.jsonl.gz", ["1", "2", "3"]),
        ("a.json", ["2 (item 1)", "5 (item 2)", "8 (item 3)"]),
        ("a.json.gz", ["2 (item 1)", "5 (item 2)", "8 (item 3)"]),
        ("a.csv", ["2", "3", "4"]),
        ("a.csv.gz", ["2", "3", "4"]),
        ("a.tsv", ["2", "3", "4"]),
        ("a.parquet", ["1", "2", "3"]),
        ("A.JSONL", ["1", "2", "3"]),
    ],
)
def test_every_file_type_gives_the_same_rows_with_their_places(tmp_path: Path, name: str, places: list[str]) -> None:
    records = read(write_rows(tmp_path / name))
    assert [record.row["text"] for record in records] == [row["text"] for row in ROWS]
    assert [record.source for record in records] == [f"{name}:{place}" for place in places]
    assert all(record.fault is None for record in records)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.rstrip(b"\n"),
        lambda data: data + b"\n\n \n",
        lambda data: gzip.compress(data),
        lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    ],
    ids=["BOM", "CRLF", "no last line end", "empty lines at the end", "gzip under a plain name", "two gzip members"],
)
def test_harmless_differences_are_fine(tmp_path: Path, change: Any) -> None:
    for name, data in (("a.jsonl", json_lines(ROWS[:2])), ("a.csv", b"text\none\nzwei\n")):
        records = read(write(tmp_path / name, change(data)))
        assert [record.fault for record in records] == [None, None], name
        assert list(records[0].row.items()) == [("text", "one")]


def test_a_bom_inside_a_file_that_was_joined_is_dropped(tmp_path: Path) -> None:
    half = b"\xef\xbb\xbf" + json_lines(ROWS[:1])
    assert [record.fault for record in read(write(tmp_path / "a.jsonl", half + half))] == [None, None]


def test_json_lines_named_json_and_one_object_over_many_lines(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a.json", json_lines(ROWS)))) == 3
    (record,) = read(write(tmp_path / "b.json", json.dumps({"messages": [{"role": "user"}]}, indent=2)))
    assert (record.source, list(record.row)) == ("b.json:1", ["messages"])
    first, second = read(write(tmp_path / "c.json", b'{"text": \n{"text": "good"}\n'))
    assert first.fault is not None
    assert second.row == {"text": "good"}


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "x"', "broken JSON: Expecting ',' delimiter at column 13"),
    (b"{'text': 'x'}", "broken JSON: Expecting property name"),
    (b"not json", "broken JSON: Expecting value at column 1"),
    (b'{"text": "x"} {"text": "y"}', "broken JSON: Extra data at column 15"),
    (b'["text"]', "a row is an object such as {…}, not a list"),
    (b'"text"', "not the text 'text'"),
    (b"null", "not null"),
    (b"3", "not the number 3"),
    (b"NaN", "not NaN"),
    (b"{}", "the row is empty"),
    (b"", "the line is empty"),
    (b"  \t ", "the line is empty"),
    ('{"text": "café"}'.encode("latin-1"), "not UTF-8: byte 0xE9 at byte 14 of the line"),
    ('{"text": "你好"}'.encode("gbk"), "not UTF-8: byte 0xC4"),
    (b'{"text": "a\x00b"}', "a NUL character at column 12"),
    (b"\x00" * 50, "a NUL character at column 1"),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": ' + b"9" * 10_000 + b"}", "broken JSON: Exceeds the limit"),
    (b'{"text": "' + b"x" * (MAX_ROW_BYTES + 10) + b'"}', "the row is longer than 16 MiB"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_costs_only_itself(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json_lines(ROWS[:1])
    records = read(write(tmp_path / "a.jsonl", good + line + b"\n" + good))
    assert [record.source for record in records] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert [record.fault is None for record in records] == [True, False, True]
    assert reason in str(records[1].fault)


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", "is empty"),
    ("a.csv", b"", "is empty"),
    ("a.json", b"", "is empty"),
    ("a.parquet", b"", "cannot read .* as Parquet"),
    ("a.jsonl", gzip.compress(b"", mtime=0), "is empty"),
    ("a.json", b"\n \n", "has no rows, only empty lines"),
    ("a.jsonl", json_lines(ROWS).decode().encode("utf-16"), "is in UTF-16 or UTF-32.*iconv -f UTF-16 -t UTF-8"),
    ("a.jsonl", json_lines(ROWS).decode().encode("utf-16-le"), "is in UTF-16"),
    ("a.jsonl", json_lines(ROWS).decode().encode("utf-16-be"), "is in UTF-16"),
    ("a.jsonl", json_lines(ROWS).decode().encode("utf-32"), "is in UTF-16 or UTF-32"),
    ("a.csv", csv_text(",").encode("utf-16"), "is in UTF-16"),
    ("a.json", json.dumps(ROWS).encode("utf-16"), "is in UTF-16"),
    ("a.jsonl", b"PAR1 something", "is a Parquet file; name it .parquet"),
    ("a.csv", b"PK\x03\x04 something", "is a zip archive or a spreadsheet"),
    ("a.jsonl", b"\x28\xb5\x2f\xfd something", "is compressed with zstd"),
    ("a.parquet", b"not parquet at all", "cannot read .* as Parquet after row 0"),
    ("a.json", b'[{"text": "x"},\n {"text": ]', r"a.json:2: broken JSON: Expecting value at column 11"),
    ("a.json", b'[{"text": "x"}\n {"text": "y"}]', r"a.json:2: broken JSON: ',' or '\]' is missing at column 2"),
    ("a.json", b'[{"text": "x"}', r"',' or '\]' is missing"),
    ("a.json", b'[{"text": "x"}] {"more": 1}', "after the end of the list"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
    ("a.json", b'[{"text": "caf\xe9"}]', r"a.json:1: not UTF-8: byte 0xE9"),
    ("a.csv", b"text,text\n1,2\n", "names 'text' twice"),
    ("a.csv", b"\n\nx\n", "the header line with the column names is empty"),
    ("a.csv", b"text;label\n1;2\n", "the columns are separated by ';', not by ','"),
    ("a.csv", b"text\tlabel\n1\t2\n", "name the file .tsv"),
]


@pytest.mark.parametrize(("name", "data", "reason"), BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_damaged_gzip_names_the_line_before_the_damage(tmp_path: Path, name: str) -> None:
    letters = random.Random(0)
    rows = ["".join(letters.choices("abcdefgh", k=60)) for _ in range(3000)]
    text = "text\n" + "\n".join(rows) if "csv" in name else "\n".join(json.dumps({"text": row}) for row in rows)
    whole = gzip.compress(text.encode())
    for damaged in (whole[: len(whole) // 2], whole[:-200] + b"\x00" * 200, b"\x1f\x8bnonsense"):
        with pytest.raises(DataError, match=r"the gzip data is damaged after line \d+"):
            read(write(tmp_path / name, damaged))


def test_faults_in_a_table_cost_only_their_row(tmp_path: Path) -> None:
    lines = [b"text,label", b"good,1", b"too,many,cells", b"few", b"", b"caf\xe9,1", b",", b'"a"b,1', b"good,2", b""]
    records = read(write(tmp_path / "a.csv", b"\n".join(lines)))
    faults = {record.source: record.fault for record in records if record.fault}
    assert [record.row["label"] for record in records if not record.fault] == ["1", "2"]
    assert list(faults) == [f"a.csv:{line}" for line in (3, 4, 5, 6, 7, 8)]
    reasons = ["3 cells where the header has 2", "1 cells", "the line is empty", "not UTF-8: byte 0xE9 at byte 4"]
    reasons += ["all cells are empty", "broken quoting"]
    for reason, fault in zip(reasons, faults.values(), strict=True):
        assert reason in str(fault)


def test_a_quote_that_never_closes_says_what_it_swallowed(tmp_path: Path) -> None:
    records = read(write(tmp_path / "a.csv", b'text,label\ngood,1\n"open,2\nlost,3\nlost,4\n'))
    assert [record.fault is None for record in records] == [True, False]
    assert records[1].source == "a.csv:3"
    assert "lines 3 to 5 were read as one row" in str(records[1].fault)


def test_long_cells_are_read(tmp_path: Path) -> None:
    (record,) = read(write(tmp_path / "a.csv", b"text\n" + b"x" * 300_000 + b"\n"))
    assert len(record.row["text"]) == 300_000
    with pytest.raises(DataError, match=r"a.csv:2: the row is longer than 16 MiB"):
        read(write(tmp_path / "a.csv", b"text\n" + b"x" * (MAX_ROW_BYTES + 1) + b"\n"))


def test_gzipped_parquet_is_named() -> None:
    with pytest.raises(DataError, match=r"rows\.parquet\.gz: Parquet is compressed inside"):
        file_suffix(Path("rows.parquet.gz"))


def test_a_list_in_one_line_may_be_longer_than_a_row(tmp_path: Path) -> None:
    rows = [{"text": "x" * (MAX_ROW_BYTES // 2)}, {"text": "y" * (MAX_ROW_BYTES + 1)}, {"text": "z" * 2**23}]
    records = read(write(tmp_path / "a.json", json.dumps(rows).encode()))
    assert [record.fault for record in records] == [None, "the row is longer than 16 MiB", None]
    assert records[2] == ("a.json:1 (item 3)", rows[2], None)


def test_parquet_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"good", b"caf\xe9", b"fine"]).view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert [record.fault for record in records] == [None, "a text is not UTF-8: byte 0xE9", None]


@pytest.mark.parametrize("name", ["a.txt", "a.xlsx", "a", "a.gz", "a.jsonll"])
def test_unknown_suffixes_list_the_known_ones(name: str) -> None:
    with pytest.raises(DataError, match=r"rows are read from \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet"):
        file_suffix(Path(name))
