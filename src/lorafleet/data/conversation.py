"""What a row becomes before it is tokenized: a conversation, plain text, or a text with its label."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from lorafleet.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(DataError):
    """A row that cannot be used; the message is the reason, without the place."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``trained`` is False for an assistant turn that is context only."""

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, with what a right answer is.

    Attributes:
        turns: At least one.
        references: All acceptable texts of the last answer, beside the answer itself.
        answer: The short final answer to compare with, where the row has one (such as the number in gsm8k).
    """

    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is trained whole, without roles."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the label that a model should answer with."""

    text: str
    label: str


Row = Conversation | PlainText | Labelled


def fingerprint(row: Row) -> bytes:
    """16 bytes that are equal for rows that train the same thing."""
    if isinstance(row, Conversation):
        return _digest(part for turn in row.turns for part in (turn.role, turn.content, str(turn.trained)))
    return _digest((row.text, row.label) if isinstance(row, Labelled) else (row.text,))


def opening(row: Row) -> bytes:
    """16 bytes that are equal for rows with the same first question; such rows are held out together."""
    if isinstance(row, Conversation):
        first = next((turn.content for turn in row.turns if turn.role != "system"), "")
        return _digest((first,))
    return _digest((row.text,))


def _digest(parts: Any) -> bytes:
    total = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.digest()


def clean_text(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Check that ``value`` is text that can be tokenized.

    Args:
        value: What the row holds.
        where: The field's name, for the reason.
        may_be_empty: Accept the empty string, and null for it.

    Raises:
        BadRow: Not text, empty, or with a NUL character or half of a surrogate pair.
    """
    if may_be_empty and value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{where} must be text, not {describe(value)}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{where} is empty")
    if (at := value.find("\x00")) >= 0:
        raise BadRow(f"{where} has a NUL character at position {at + 1}")
    if found := _SURROGATE.search(value):
        raise BadRow(
            f"{where} has half of a surrogate pair (U+{ord(found.group()):04X}) at position {found.start() + 1}, "
            "which is no character"
        )
    return value


def describe(value: Any) -> str:
    """Name a value's kind in JSON's words, for a reason."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "NaN" if value != value else f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "a list"
    return f"a {type(value).__name__}"
