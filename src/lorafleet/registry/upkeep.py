"""Looking after a registry: is every bit as it was written, and what may be deleted."""

import re
import shutil
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, select

from lorafleet.errors import RegistryError, raise_all
from lorafleet.pace import Pace
from lorafleet.registry import queries
from lorafleet.registry.blobs import LocalBlobs
from lorafleet.registry.contents import revision_of
from lorafleet.registry.names import parse_reference
from lorafleet.registry.registry import Registry
from lorafleet.registry.tables import aliases, is_whole, metadata, revisions, versions
from lorafleet.registry.version import Version, promoted

_ABANDONED_SECONDS = 24 * 3600
"""A temporary file this old is nobody's any more: its writer was killed."""


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
        rows = {
            table.name: connection.execute(select(table).order_by(*table.primary_key)).mappings().all()
            for table in metadata.sorted_tables
        }
    faults = [
        f"the row {_key(row)} of {name} was changed" for name in rows for row in rows[name] if not is_whole(dict(row))
    ]
    for row in rows["revisions"]:
        if revision_of(row["files"]) != row["revision"]:
            faults.append(f"the revision {row['revision'][:12]}… does not have the files it is named by")
    faults += _wrong_aliases(rows["aliases"], rows["moves"])
    sizes, wanted = registry.blobs.sizes(), dict[str, str]()
    for row in rows["revisions"]:
        wanted |= {digest: f"{path} of revision {row['revision'][:12]}…" for path, digest in row["files"].items()}
    pace = Pace("files read", len(wanted))
    for digest, what in wanted.items():
        try:
            registry.blobs.read(digest)
        except RegistryError as error:
            faults.append(f"{what}: {error}")
        pace.add(1)
    raise_all(RegistryError, faults, f"the registry {registry.location} is damaged")
    return VerifyResult(
        revisions=len(rows["revisions"]),
        versions=len(rows["versions"]),
        aliases=len(rows["aliases"]),
        files=len(wanted),
        bytes=sum(sizes[digest] for digest in wanted),
        unused=len(sizes.keys() - wanted.keys()),
    )


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
    with registry.database.writing() as connection:
        wanted = {version.label for version in (queries.find(connection, one) for one in named)}
        needed = _needed(connection)
        faults = [f"{label} is needed by {needed[label]}" for label in sorted(wanted & needed.keys())]
        raise_all(RegistryError, faults, "nothing was deleted")
        every = queries.every_version(connection)
        doomed = [one for one in every if one.label in wanted | (_old(every, keep) - needed.keys())]
        for one in doomed:
            mine = (versions.c.name == one.name) & (versions.c.number == one.number)
            connection.execute(delete(versions).where(mine))
        kept = {one.revision for one in every if one not in doomed}
        unused = [r for r in connection.scalars(select(revisions.c.revision)) if r not in kept]
        if unused:
            connection.execute(delete(revisions).where(revisions.c.revision.in_(unused)))
        files = _files_without_revision(registry, connection)
        if dry_run:
            connection.rollback()
    if not dry_run:
        files = _delete_files(registry, unused)
    labels = tuple(one.label for one in doomed)
    return GcResult(labels, tuple(unused), len(files), sum(files.values()), dry_run)


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
        return time.time() - (registry.blobs.folder / name).stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _delete_files(registry: Registry, gone: Iterable[str]) -> dict[str, int]:
    """Delete what no revision has, while nobody can add one that does."""
    for revision in gone:
        shutil.rmtree(registry.folders / revision, ignore_errors=True)
    with registry.database.writing() as connection:
        files = _files_without_revision(registry, connection)
        for name in files:
            registry.blobs.delete(name)
    return files


def _key(row: RowMapping) -> str:
    return ":".join(str(row[key]) for key in ("name", "alias", "number", "revision", "id") if key in row)


def _wrong_aliases(pointing: Iterable[RowMapping], moved: Iterable[RowMapping]) -> list[str]:
    """Aliases that are not where the last move put them."""
    last = {(row["name"], row["alias"]): row["after"] for row in moved}
    now = {(row["name"], row["alias"]): row["number"] for row in pointing}
    return [
        f"{name}@{alias} is at version {now.get((name, alias))}, but was last moved to {last.get((name, alias))}"
        for name, alias in sorted(last.keys() | now.keys())
        if now.get((name, alias)) != last.get((name, alias))
    ]
