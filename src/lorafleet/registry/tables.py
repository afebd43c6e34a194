"""The registry's tables. Each row carries a digest of its values, by which a flipped bit in it is found.

revisions   what was added, once: its files by hash, where it came from
versions    name:1, name:2 …: a revision under a name, whether it passed, its scores and tags
aliases     name@prod: which version that is now
moves       every promotion and rollback, in order, and the newest version of a name that was deleted; never changed
registry    an id that the files carry too, lest they be taken for another registry's
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from lorafleet.models.digest import sha256_json
from lorafleet.registry.names import LONGEST

HEAD = "0002"
"""The newest migration."""

DELETED = "delete"
"""The kind of a move that is none: a version is gone, and its number is not given again."""

metadata = MetaData()
revisions = Table(
    "revisions",
    metadata,
    Column("revision", String(64), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("files", JSON, nullable=False),
    Column("lineage", JSON, nullable=False),
    Column("digest", String(64), nullable=False),
)
versions = Table(
    "versions",
    metadata,
    Column("name", String(LONGEST), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("revision", ForeignKey("revisions.revision"), nullable=False),
    Column("rejected", Text),
    Column("scores", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("created", String(32), nullable=False),
    Column("digest", String(64), nullable=False),
    UniqueConstraint("name", "revision"),
)
aliases = Table(
    "aliases",
    metadata,
    Column("name", String(LONGEST), primary_key=True),
    Column("alias", String(LONGEST), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
)
moves = Table(
    "moves",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(LONGEST), nullable=False),
    Column("alias", String(LONGEST), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("before", Integer),
    Column("after", Integer, nullable=False),
    Column("moved", String(32), nullable=False),
    Column("digest", String(64), nullable=False),
)
registry = Table(
    "registry",
    metadata,
    Column("identity", String(32), primary_key=True),
    Column("digest", String(64), nullable=False),
    sqlite_with_rowid=False,  # an index of its own would cost each registry a page
)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row's values with their digest."""
    return {**values, "digest": _digest(values)}


def is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row's values are those that were written."""
    return bool(row["digest"] == _digest(row))


def _digest(values: Mapping[str, Any]) -> str:
    return sha256_json({name: value for name, value in values.items() if name not in ("digest", "id")})
