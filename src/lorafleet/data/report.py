"""What was read, what is trained and what was not: counted, and shown by one decoded example."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lorafleet.data.store import TokenRow, TokenRows

TRAINED_OPEN, TRAINED_CLOSE = "«", "»"

KEPT_REJECTIONS = 1000
_SHOWN_REJECTIONS = 10
_SHOWN_CHARACTERS = 1200


class SplitReport(BaseModel):
    """The rows of one split: ``read = used + rejected + held_out``.

    Attributes:
        read: Rows read from files; for a valid split that was held out, the rows taken from train.
        used: Rows in this split.
        rejected: Rows that cannot be used.
        held_out: Rows that went from train to valid.
        samples: Sequences that the used rows became; more than rows where each answer is its own sample.
        truncated: Used rows that lost tokens to max_length.
        duplicates: Used rows that equal an earlier one; they are kept.
        neutralised: Used rows with a control token's string that was kept as text.
        tokens: Tokens of all samples.
        trained_tokens: Tokens that are predicted.
        shortest: Tokens of the shortest sample.
        median: Tokens of the middle sample.
        longest: Tokens of the longest sample.
    """

    model_config = ConfigDict(frozen=True)

    read: int
    used: int
    rejected: int
    held_out: int
    samples: int
    truncated: int
    duplicates: int
    neutralised: int
    tokens: int
    trained_tokens: int
    shortest: int
    median: int
    longest: int

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0


class Rejection(BaseModel):
    """A row that cannot be used: its place and the reason."""

    model_config = ConfigDict(frozen=True)

    source: str
    reason: str


@dataclass
class Outcome:
    """What happened to the rows of one split's files.

    Attributes:
        read: Rows read.
        rejected: Rows that cannot be used.
        rejections: The first ``KEPT_REJECTIONS`` of them.
        content: Hash of the tokens and masks that were written.
    """

    read: int = 0
    rejected: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    content: str = ""

    def reject(self, source: str, reason: str) -> None:
        """Count a rejected row and keep its reason."""
        self.rejected += 1
        if len(self.rejections) < KEPT_REJECTIONS:
            self.rejections.append(Rejection(source=source, reason=reason))


class Example(BaseModel):
    """One decoded row; what is trained stands between « and »."""

    model_config = ConfigDict(frozen=True)

    source: str
    text: str


class DataReport(BaseModel):
    """What a data set holds and how it is trained; the same for ``train`` and ``data inspect``.

    Attributes:
        data: The source as the user named it.
        format: The shape of the rows.
        task: label, chat or text.
        template: Which chat template: model, plain, or a file.
        mask_strategies: How answers were found, and in how many samples.
        end_of_turn: The token that ends an answer.
        labels: Rows of each label in train (of the first split, when there is no train); empty for other tasks.
        splits: Counts by split.
        rejections: The rejected rows, the first 1,000 of them.
        warnings: What a user should look at.
        ignored: Files of the folder that were not read.
        example: The first row of train.
    """

    model_config = ConfigDict(frozen=True)

    data: str
    format: str
    task: str
    template: str
    mask_strategies: dict[str, int]
    end_of_turn: str
    labels: dict[str, int]
    splits: dict[str, SplitReport]
    rejections: tuple[Rejection, ...]
    warnings: tuple[str, ...]
    ignored: tuple[str, ...]
    example: Example

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values, with ``trained_share`` in each split."""
        whole = self.model_dump(mode="json")
        for name, split in self.splits.items():
            whole["splits"][name]["trained_share"] = round(split.trained_share, 6)
        return whole

    def render(self) -> RenderableType:
        """The report for a terminal."""
        parts: list[RenderableType] = [Text("\n".join(self._summary())), _split_table(self.splits)]
        if self.rejections:
            parts.append(Text("\n".join(self._rejection_lines()), style="red"))
        parts += [Text(f"note: {printable(warning)}", style="yellow") for warning in self.warnings]
        title = Text(f"example {self.example.source}, trained part between {TRAINED_OPEN} and {TRAINED_CLOSE}:")
        parts += [title, Padding(marked_text(self.example.text), (0, 2))]
        return Group(*parts)

    def _summary(self) -> list[str]:
        found = ", ".join(f"{name} ({count})" for name, count in self.mask_strategies.items())
        lines = [
            f"data: {printable(self.data)}, {self.format} rows, task {self.task}",
            f"chat template: {self.template}; answers end with {self.end_of_turn}; found by {found}",
        ]
        if self.labels:
            shown = [f"{printable(label)} {count}" for label, count in list(self.labels.items())[:10]]
            more = f", … {len(self.labels)} labels" if len(self.labels) > 10 else ""
            lines.append(f"labels: {', '.join(shown)}{more}")
        if self.ignored:
            lines.append(f"files not read: {printable(', '.join(self.ignored))}")
        return lines

    def _rejection_lines(self) -> list[str]:
        total = sum(split.rejected for split in self.splits.values())
        return [
            f"{total} rejected:",
            *(f"  {item.source}: {printable(item.reason)}" for item in self.rejections[:_SHOWN_REJECTIONS]),
            *([f"  … and {total - _SHOWN_REJECTIONS} more"] if total > _SHOWN_REJECTIONS else []),
        ]


def split_report(rows: TokenRows, *, read: int, rejected: int, held_out: int) -> SplitReport:
    """Count the rows of one split."""
    first = rows.column("first")

    def count(name: str) -> int:
        per_row = []
        for starts, flag in zip(first, rows.column(name), strict=True):
            if starts:
                per_row.append(flag)
            else:
                per_row[-1] |= flag
        return sum(per_row)

    lengths = rows.lengths if len(rows) else np.zeros(1, dtype=np.int32)
    return SplitReport(
        read=read,
        used=sum(first),
        rejected=rejected,
        held_out=held_out,
        samples=len(rows),
        truncated=count("truncated"),
        duplicates=count("duplicate"),
        neutralised=count("neutralised"),
        tokens=int(rows.lengths.sum()),
        trained_tokens=int(rows.trained.sum()),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
    )


def decode_example(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Decode a row, with its trained spans between « and »; the middle of a long one is left out."""
    edges = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8), prepend=-1, append=-1))
    parts = []
    for start, end in pairwise(edges):
        text = _shorter(str(tokenizer.decode(row.input_ids[start:end].tolist(), skip_special_tokens=False)))
        parts.append(f"{TRAINED_OPEN}{text}{TRAINED_CLOSE}" if row.loss_mask[start] else text)
    left_out = 0
    while len(parts) > 4 and sum(map(len, parts)) > 2 * _SHOWN_CHARACTERS:
        left_out += len(parts.pop(len(parts) // 2))
    if left_out:
        parts.insert((len(parts) + 1) // 2, f"\n… ({left_out:,} characters) …\n")
    return Example(source=row.source, text="".join(parts))


def _shorter(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"


def printable(text: str) -> str:
    """The text with control characters written out, so that data cannot command the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def marked_text(text: str) -> Text:
    """The example for a terminal, its trained spans in bold."""
    marked = Text()
    trained = False
    for char in printable(text):
        trained = trained or char == TRAINED_OPEN
        marked.append(char, style="bold green" if trained else "")
        trained = trained and char != TRAINED_CLOSE
    return marked


def _split_table(splits: dict[str, SplitReport]) -> Table:
    columns = ("split", "read", "used", "rejected", "held out", "truncated", "duplicates", "samples", "tokens")
    table = Table(*columns, "trained", "share", "tokens a sample")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in splits.items():
        counts = (split.read, split.used, split.rejected, split.held_out, split.truncated, split.duplicates)
        more = (split.samples, split.tokens, split.trained_tokens)
        lengths = f"{split.shortest} – {split.median} – {split.longest}"
        numbers = [f"{count:,}" for count in (*counts, *more)]
        table.add_row(name, *numbers, f"{split.trained_share:.1%}", lengths)
    return table
