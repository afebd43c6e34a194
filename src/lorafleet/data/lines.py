"""Files to lines: gzip undone, encodings other than UTF-8 refused, every line with its number."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lorafleet.errors import DataError

# One row never needs more; a longer line is a damaged file or an attack, and would fill the memory.
MAX_ROW_BYTES = 16 * 2**20
TOO_LONG = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"

_BOM = b"\xef\xbb\xbf"
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as CSV",
    b"BZh": "compressed with bzip2; decompress it, or use gzip",
    b"\xfd7zXZ": "compressed with xz; decompress it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it, or use gzip",
    b"ARROW1": "an Arrow file; write it as Parquet",
}
_FIRST_TWO_BYTES_OF_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Line(NamedTuple):
    """A line without its line end. ``fault`` says why its text cannot be used."""

    number: int
    text: str
    fault: str | None = None


def read_lines(path: Path, limit: int | None = MAX_ROW_BYTES) -> Iterator[Line]:
    """Yield the lines of a UTF-8 text file, gzipped or not; a BOM and CRLF are dropped.

    A line that is not UTF-8 or has more than ``limit`` bytes comes with a fault. Its bytes that are not UTF-8 are kept
    as lone surrogates, so that a reader that joins lines can still find them.

    Raises:
        DataError: The file is empty, absent, of another format, in UTF-16 or UTF-32, or its gzip data is damaged.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if is_gzip else raw)
            _check_start(path, stream)
            for number, data in enumerate(_split(stream, limit), start=1):
                yield _decode(number, data, limit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip data is damaged after line {number} ({error}); make the file again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _check_start(path: Path, stream: BinaryIO) -> None:
    head = stream.read(8)
    stream.seek(0)
    if not head:
        raise DataError(f"{path} is empty")
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    # Text of one byte a character in UTF-16 or UTF-32 has NULs between its first characters.
    has_nul_pattern = re.match(rb"(?:[^\x00]\x00{1,3}){2}|(?:\x00{1,3}[^\x00]){2}", head) is not None
    if head.startswith(_FIRST_TWO_BYTES_OF_UTF16) or head.startswith(b"\x00\x00\xfe\xff") or has_nul_pattern:
        raise DataError(
            f"{path} is in UTF-16 or UTF-32; rows are read as UTF-8. "
            f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new"
        )


def _split(stream: BinaryIO, limit: int | None) -> Iterator[bytes]:
    """Lines with their ends; of a line that is too long, one byte more than the limit."""
    reader = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, stream), 2**20)
    if limit is None:
        yield from reader
        return
    while data := reader.readline(limit + 1):
        yield data
        while len(data) > limit and not data.endswith(b"\n"):
            data = reader.readline(limit + 1)


def _decode(number: int, data: bytes, limit: int | None) -> Line:
    if limit is not None and len(data) > limit:
        return Line(number, "", TOO_LONG)
    data = data.removesuffix(b"\n").removesuffix(b"\r").removeprefix(_BOM)
    try:
        return Line(number, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        fault = not_utf8(data[error.start], error.start + 1)
        return Line(number, data.decode("utf-8", "surrogateescape"), fault)


def not_utf8(byte: int, position: int) -> str:
    """The reason for a row with a byte that is not UTF-8."""
    return (
        f"not UTF-8: byte 0x{byte:02X} at byte {position} of the line; "
        "the file, or this line, is in another encoding (such as Windows-1252 or GBK)"
    )
