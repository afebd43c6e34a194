"""Tokenized rows on disk: Arrow files that are memory-mapped, so a data set needs no more memory than is looked at."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lorafleet.data.encode import Sample

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("source", pa.string()),
        ("trained_tokens", pa.int32()),
        ("prompt_length", pa.int32()),
        ("reference", pa.string()),
        ("references", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("strategy", pa.string()),
        ("truncated", pa.bool_()),
        ("neutralised", pa.bool_()),
        ("duplicate", pa.bool_()),
        ("first", pa.bool_()),
        ("fingerprint", pa.binary(16)),
        ("opening", pa.binary(16)),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence, ready for a batch. The arrays are read-only views of the file.

    Attributes:
        input_ids: int32 ``(tokens,)``.
        loss_mask: bool ``(tokens,)``; True at t means that token t is predicted, by the logits at t - 1.
        source: ``file:line`` of the row.
        prompt_length: Tokens before the last answer; 0 for plain text.
        reference: The last answer's text, or the label; empty for plain text.
        references: All texts that are as good, from the row's field ``references``.
        answer: What to compare a generated answer with: the row's field ``answer``, or else its ``references``, one a
            line; None when the row has neither.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    source: str
    prompt_length: int
    reference: str
    references: tuple[str, ...] = ()
    answer: str | None = None


class TokenRows(Sequence[TokenRow]):
    """Tokenized rows of one split, memory-mapped.

    Args:
        path: A file that ``RowWriter`` wrote.
        selection: Which of its rows, and in which order; all when None.

    Attributes:
        lengths: Tokens of each row, int32 ``(rows,)``.
        trained: Trained tokens of each row, int32 ``(rows,)``.
    """

    def __init__(self, path: Path, selection: NDArray[np.int64] | None = None) -> None:
        self._file = pa.memory_map(str(path))
        self._table = pa.ipc.open_stream(self._file).read_all()
        batches = self._table.to_batches()
        self._batches = [batch for batch in batches if batch.num_rows]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64).tolist()
        self._ids = [_views(batch.column("input_ids"), np.int32) for batch in self._batches]
        self._masks = [_views(batch.column("loss_mask"), np.bool_) for batch in self._batches]
        self.selection = np.arange(self._table.num_rows) if selection is None else selection
        lengths = [np.diff(offsets) for offsets, _ in self._ids]
        trained = [batch.column("trained_tokens").to_numpy() for batch in self._batches]
        self.lengths: NDArray[np.int32] = _joined(lengths)[self.selection]
        self.trained: NDArray[np.int32] = _joined(trained)[self.selection]

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: Any) -> Any:
        """Row ``index`` as a TokenRow; a slice gives a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = int(self.selection[index])
        which = bisect_right(self._ends, row)
        at = row - (self._ends[which - 1] if which else 0)
        batch = self._batches[which]
        references = tuple(batch.column("references")[at].as_py())
        answer = batch.column("answer")[at].as_py()
        return TokenRow(
            input_ids=_view(self._ids[which], at),
            loss_mask=_view(self._masks[which], at),
            source=batch.column("source")[at].as_py(),
            prompt_length=batch.column("prompt_length")[at].as_py(),
            reference=batch.column("reference")[at].as_py(),
            references=references,
            answer="\n".join(references) if answer is None and references else answer,
        )

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str) -> list[Any]:
        """The values of one column, for the selected rows in order."""
        values = self._table.column(name).to_pylist()
        return [values[i] for i in self.selection.tolist()]


def sample(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """So many rows of a file that may be sorted, always the same ones; fewer of them are among more of them."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return [rows[int(i)] for i in sorted(chosen)]


class RowWriter:
    """Writes tokenized rows into an Arrow file, batch by batch; a context manager.

    Attributes:
        content: SHA-256 over the token ids and masks written so far, in order.
    """

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self.content = sha256()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._file.close()

    def write(self, rows: Sequence[tuple[str, Sequence[Sample], bool, bytes, bytes]]) -> None:
        """Write rows as (source, samples, is a duplicate, fingerprint, opening)."""
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for source, samples, duplicate, fingerprint, opening in rows:
            for number, sample in enumerate(samples):
                ids, mask = sample.ids.astype(np.int32), sample.mask.astype(np.uint8)
                self.content.update(len(ids).to_bytes(8, "little") + ids.tobytes() + mask.tobytes())
                values = {
                    "input_ids": ids,
                    "loss_mask": mask,
                    "source": source,
                    "trained_tokens": int(sample.mask.sum()),
                    "prompt_length": sample.answer[0],
                    "reference": sample.reference,
                    "references": list(sample.references),
                    "answer": sample.final,
                    "strategy": sample.strategy,
                    "truncated": sample.truncated,
                    "neutralised": sample.neutralised,
                    "duplicate": duplicate,
                    "first": number == 0,
                    "fingerprint": fingerprint,
                    "opening": opening,
                }
                for name, value in values.items():
                    columns[name].append(value)
        if columns["source"]:
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


Views = tuple[NDArray[np.int64], NDArray[Any]]


def _views(column: Any, dtype: type[np.generic]) -> Views:
    """Offsets and values of a list column, without copying the values."""
    values: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    return column.offsets.to_numpy(), values.view(dtype)


def _view(views: Views, at: int) -> NDArray[Any]:
    offsets, values = views
    return values[offsets[at] : offsets[at + 1]]


def _joined(parts: list[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts]).astype(np.int32)
