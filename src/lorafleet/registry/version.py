"""What the registry tells about an adapter: its versions, and how aliases have moved."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Version:
    """A revision under a name.

    Attributes:
        name: The adapter's name.
        number: Its version, from 1.
        revision: The hash of its files.
        rejected: Why it did not pass; none where it did.
        scores: Its measurements.
        tags: Words to find it by.
        aliases: Those that point at it.
        created: When it was added, UTC.
        size: Bytes of its files, those that other revisions share included.
        files: The SHA-256 of each file.
        lineage: What it came from, by hash, and for each runtime the reasons why it cannot serve it.
    """

    name: str
    number: int
    revision: str
    rejected: str | None
    scores: dict[str, float]
    tags: tuple[str, ...]
    aliases: tuple[str, ...]
    created: str
    size: int
    files: dict[str, str]
    lineage: dict[str, Any]

    @property
    def label(self) -> str:
        """``name:number``."""
        return f"{self.name}:{self.number}"

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class Move:
    """An alias that was set.

    Attributes:
        name: The adapter's name.
        alias: The alias.
        kind: ``promote`` or ``rollback``.
        before: The version it pointed at; none where it was new.
        after: The version it has pointed at since.
        moved: When, UTC.
    """

    name: str
    alias: str
    kind: str
    before: int | None
    after: int
    moved: str

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def promoted(history: Iterable[Move]) -> list[int]:
    """The versions that an alias would roll back through, the one it points at last."""
    stack: list[int] = []
    for move in history:
        if move.kind == "rollback":
            stack.pop()
        elif not stack or stack[-1] != move.after:
            stack.append(move.after)
    return stack
