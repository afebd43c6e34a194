"""What the rows of a source are, decided before any of them is tokenized: their shape, and their labels."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lorafleet.config.data import DataConfig
from lorafleet.data.conversation import BadRow, Labelled
from lorafleet.data.labels import LabelPrompt, check_prompt_template
from lorafleet.data.reading import Record
from lorafleet.data.shapes import convert_row, detect_shape
from lorafleet.data.sources import Source, Split
from lorafleet.errors import ConfigError

_ROWS_TO_DETECT = 200
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Plan:
    """How the rows of a source are read.

    Attributes:
        shape: The shape of its rows; None when no row can be read at all.
        detected: Whether the shape was detected, not named.
        prompt: For text/label rows, what turns a text into a question.
        label_counts: For text/label rows, the rows of each label in each split.
    """

    shape: str | None
    detected: bool
    prompt: LabelPrompt | None
    label_counts: dict[str, Counter[str]]

    @property
    def task(self) -> Literal["label", "chat", "text"]:
        """What the rows teach."""
        return "label" if self.shape == "text_label" else "text" if self.shape == "text" else "chat"

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, sorted; numbers by their value."""
        return self.prompt.labels if self.prompt else ()


def make_plan(source: Source, config: DataConfig) -> Plan:
    """Find the shape of the rows and, for text/label rows, all labels.

    Raises:
        DataError: The rows have no known shape, or a file cannot be read.
        ConfigError: A knob does not fit rows of this shape.
    """
    if config.prompt_template is not None:
        check_prompt_template(config.prompt_template)
    detected = config.data_format == "auto"
    shape = _detect(source, config) if detected else config.data_format
    if shape is not None and shape != "text_label" and config.prompt_template is not None:
        raise ConfigError(f"prompt_template is for text/label rows; the rows of {config.data} are of the shape {shape}")
    if shape is not None and shape != "text_label" and config.labels:
        raise ConfigError(f"labels is for text/label rows; the rows of {config.data} are of the shape {shape}")
    if shape == "text" and config.system_prompt is not None:
        raise ConfigError(f"system_prompt is for conversations; the rows of {config.data} are plain text")
    if shape != "text_label":
        return Plan(shape, detected, None, {})
    counts = {name: _count_labels(split, config) for name, split in source.splits.items()}
    labels = _sorted({label for part in counts.values() for label in part}.union(config.labels))
    return Plan(shape, detected, LabelPrompt(labels, config.prompt_template), counts)


def records_of(split: Split, config: DataConfig) -> Iterator[Record]:
    """The rows of a split, at most ``max_rows`` of them."""
    return islice(split.records(), config.max_rows)


def _detect(source: Source, config: DataConfig) -> str | None:
    """The shape that most of the first readable rows fit: of train, as far as there are any."""
    for split in source.splits.values():
        readable = (record for record in records_of(split, config) if record.fault is None)
        rows = [(record.source, record.row) for record in islice(readable, _ROWS_TO_DETECT)]
        if rows:
            return detect_shape(rows)
    return None


def _count_labels(split: Split, config: DataConfig) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record in records_of(split, config):
        if record.fault is None:
            try:
                row = convert_row("text_label", record.row)
            except BadRow:
                continue  # rejected, with its reason, when it is tokenized
            if isinstance(row, Labelled):
                counts[row.label] += 1
    return counts


def _sorted(labels: set[str]) -> list[str]:
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)
