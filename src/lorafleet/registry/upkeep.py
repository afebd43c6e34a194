"""Looking after a registry: is every bit as it was written, and what may be deleted."""

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, and_, delete, insert, select
from sqlalchemy.exc import DBAPIError

from lorafleet.errors import RegistryError, raise_all
from lorafleet.pace import Pace
from lorafleet.registry import queries
from lorafleet.registry.blobs import ABANDONED_SECONDS, LocalBlobs
from lorafleet.registry.contents import revision_of
from lorafleet.registry.names import parse_reference
from lorafleet.registry.registry import Registry, now
from lorafleet.registry.tables import DELETED, aliases, is_whole, metadata, moves, revisions, sealed, versions
from lorafleet.registry.version import Move, Version, promoted


@dataclass(frozen=True)
class VerifyResult:
    """A registry that was found as it was written.

    Attributes:
        revisions: Revisions in it.
        versions: Versions of them under names.
        aliases: Aliases that point at versions.
        files: Files read, each as often as it is kept, which is once.
        bytes: Their bytes.
        unused: Files that no revision has; ``gc`` deletes them.
    """

    revisions: int
    versions: int
    aliases: int
    files: int
    bytes: int
    unused: int

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class GcResult:
    """What was deleted, or would be.

    Attributes:
        versions: Versions, as ``name:number``.
        revisions: Revisions that no version has any more.
        files: Files that no revision has any more.
        bytes: Their bytes.
        dry_run: Whether it was only looked.
    """

    versions: tuple[str, ...]
    revisions: tuple[str, ...]
    files: int
    bytes: int
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def verify(registry: Registry) -> VerifyResult:
    """Read every file and every row, and compare them with their hashes.

    Raises:
        RegistryError: Anything is missing or not as it was written; all of it is listed.
    """
    with registry.database.reading() as connection:
        faults = registry.database.faults(connection)
        rows = {table.name: _rows(connection, table, faults) for table in metadata.sorted_tables}
    faults += [
        f"the row {_key(row)} of {name} was changed" for name in rows for row in rows[name] if not is_whole(dict(row))
    ]
    for row in rows["revisions"]:
        if revision_of(row["files"]) != row["revision"]:
            faults.append(f"the revision {row['revision'][:12]}… does not have the files it is named by")
    faults += _wrong_aliases(rows["aliases"], rows["moves"])
    files = {row["revision"]: row["files"] for row in rows["revisions"]}
    wanted = {
        digest: f"{path} of revision {revision[:12]}…" for revision in files for path, digest in files[revision].items()
    }
    unused = len(registry.blobs.sizes().keys() - wanted.keys())
    read, damaged = _read(registry, wanted)
    faults += damaged
    faults += registry.folders.faults(files)
    raise_all(RegistryError, faults, f"the registry {registry.location} is damaged")
    return VerifyResult(
        revisions=len(rows["revisions"]),
        versions=len(rows["versions"]),
        aliases=len(rows["aliases"]),
        files=len(wanted),
        bytes=read,
        unused=unused,
    )


def _read(registry: Registry, wanted: Mapping[str, str]) -> tuple[int, list[str]]:
    """Read files, of which it is said what they are; how many bytes, and what is wrong with them."""
    count, faults, pace = 0, {}, Pace("files read", len(wanted))
    for digest, what in wanted.items():
        try:
            count += len(registry.blobs.read(digest))
        except RegistryError as error:
            faults[digest] = f"{what}: {error}"
        pace.add(1)
    with registry.database.reading() as connection:  # a gc may have taken some meanwhile, with their revisions
        rows = _rows(connection, revisions, []) if faults else []
    still = {digest for row in rows for digest in row["files"].values()}
    return count, [fault for digest, fault in faults.items() if digest in still]


def _rows(connection: Connection, table: Table, faults: list[str]) -> Sequence[RowMapping]:
    """All rows of a table that can be read; of the others a fault is noted."""
    try:
        return connection.execute(select(table).order_by(*table.primary_key)).mappings().all()
    except (ValueError, DBAPIError):  # JSON or text that is none any more: row by row to find out where
        rows: list[RowMapping] = []
    for key in connection.execute(select(*table.primary_key)).all():
        mine = and_(*(column == value for column, value in zip(table.primary_key, key, strict=True)))
        try:
            rows += connection.execute(select(table).where(mine)).mappings().all()
        except (ValueError, DBAPIError) as error:
            faults.append(f"the row {':'.join(map(str, key))} of {table.name} was changed and cannot be read: {error}")
    return rows


def gc(
    registry: Registry, references: Iterable[str] = (), *, keep: int | None = None, dry_run: bool = False
) -> GcResult:
    """Delete versions that are named or old, revisions without a version, and files without a revision.

    What an alias points at, or would roll back to, always stays.

    Args:
        registry: Where.
        references: Versions to delete.
        keep: Of every name, how many of the newest versions stay; None keeps all that are not named.
        dry_run: Only say what would be deleted.

    Raises:
        ConfigError: A reference is none.
        RegistryError: A version that is named does not exist or is needed by an alias; then nothing is deleted.
    """
    named = [parse_reference(reference) for reference in references]
    registry.check_files()
    with registry.database.writing() as connection:
        wanted = {version.label for version in (queries.find(connection, one) for one in named)}
        needed = _needed(connection)
        faults = [f"{label} is needed by {needed[label]}" for label in sorted(wanted & needed.keys())]
        raise_all(RegistryError, faults, "nothing was deleted")
        every = queries.every_version(connection)
        labels = wanted | (_old(every, keep) - needed.keys())
        doomed = [one for one in every if one.label in labels]
        for one in doomed:
            mine = (versions.c.name == one.name) & (versions.c.number == one.number)
            connection.execute(delete(versions).where(mine))
        for name, number in {one.name: one.number for one in doomed}.items():  # the newest of each
            gone = Move(name, "", DELETED, None, number, now())
            connection.execute(insert(moves).values(sealed(asdict(gone))))
        orphaned = revisions.c.revision.not_in(select(versions.c.revision))
        unused = connection.scalars(select(revisions.c.revision).where(orphaned)).all()
        connection.execute(delete(revisions).where(orphaned))
        files = _files_without_revision(registry, connection)
        if dry_run:
            connection.rollback()
    if not dry_run:
        files = _delete_files(registry)
    return GcResult(tuple(one.label for one in doomed), tuple(unused), len(files), sum(files.values()), dry_run)


def _old(every: Iterable[Version], keep: int | None) -> set[str]:
    by_name: dict[str, list[Version]] = {}
    for one in every:
        by_name.setdefault(one.name, []).append(one)
    return set() if keep is None else {v.label for mine in by_name.values() for v in mine[: max(0, len(mine) - keep)]}


def _needed(connection: Connection) -> dict[str, str]:
    """Versions that must stay, and the alias that needs each."""
    found = {}
    for name, alias in connection.execute(select(aliases.c.name, aliases.c.alias)).all():
        for number in promoted(queries.moves_of(connection, name, alias))[-2:]:
            found[f"{name}:{number}"] = f"{name}@{alias}"
    return found


def _files_without_revision(registry: Registry, connection: Connection) -> dict[str, int]:
    used = {digest for files in connection.scalars(select(revisions.c.files)) for digest in files.values()}
    return {name: size for name, size in registry.blobs.sizes().items() if _may_go(registry, name, used)}


def _may_go(registry: Registry, name: str, used: Collection[str]) -> bool:
    """Whether a file is no revision's; a temporary one may be somebody's who is writing it."""
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return name not in used
    if not isinstance(registry.blobs, LocalBlobs) or not name.endswith(".tmp"):
        return False
    try:
        return time.time() - (registry.blobs.folder / name).stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _delete_files(registry: Registry) -> dict[str, int]:
    """Delete what no revision has, while nobody can add one that does."""
    with registry.database.writing() as connection:
        registry.folders.sweep(set(connection.scalars(select(revisions.c.revision))))
        files = _files_without_revision(registry, connection)
        for name in files:
            registry.blobs.delete(name)
    return files


def _key(row: RowMapping) -> str:
    return ":".join(str(row[key]) for key in ("name", "alias", "number", "revision", "id", "identity") if key in row)


def _wrong_aliases(pointing: Iterable[RowMapping], moved: Iterable[RowMapping]) -> list[str]:
    """Aliases that are not where the last move put them."""
    last = {(row["name"], row["alias"]): row["after"] for row in moved if row["kind"] != DELETED}
    now = {(row["name"], row["alias"]): row["number"] for row in pointing}
    return [
        f"{name}@{alias} is at version {now.get((name, alias))}, but was last moved to {last.get((name, alias))}"
        for name, alias in sorted(last.keys() | now.keys())
        if now.get((name, alias)) != last.get((name, alias))
    ]
