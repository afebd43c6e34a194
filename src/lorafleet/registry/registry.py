"""The registry: adapters as immutable revisions, under names, with versions that aliases point at.

A revision is named by the hash of its files, so equal bytes are one. Files are written first and the database last, in
one transaction: whoever is killed in between leaves the registry as it was, and files that ``gc`` finds.
"""

import datetime
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, Connection, insert, select, update

from lorafleet.cache import cache_folder
from lorafleet.errors import ConfigError, RegistryError, raise_all
from lorafleet.registry import queries
from lorafleet.registry.blobs import Blobs, LocalBlobs, open_blobs
from lorafleet.registry.contents import hashes, read_contents, revision_of
from lorafleet.registry.database import Database
from lorafleet.registry.folders import Folders
from lorafleet.registry.names import Reference, name_fault, parse_reference
from lorafleet.registry.queries import PROD
from lorafleet.registry.tables import aliases, moves, revisions, sealed, versions
from lorafleet.registry.version import Move, Version, promoted

HOME = "LORAFLEET_REGISTRY"
"""The environment variable that says where the registry is."""

_DATABASE = "registry.db"
_FOLDERS = "folders"


class Registry:
    """Adapters, their versions and aliases. Every change is one transaction, safe beside other processes.

    Args:
        location: A folder, or a URL that fsspec knows; ``$LORAFLEET_REGISTRY`` or ``~/.lorafleet/registry`` where None.
        database: SQLAlchemy's URL; SQLite in the folder where None.
        create: Whether to start a registry where there is none.

    Raises:
        ConfigError: A URL is none, or an object store comes without a database.
        RegistryError: There is no registry, or its database cannot be used.
    """

    def __init__(self, location: str | None = None, database: str | None = None, *, create: bool = False) -> None:
        self.location = location or os.environ.get(HOME) or "~/.lorafleet/registry"
        self.blobs: Blobs = open_blobs(self.location)
        local = self.blobs.folder.parent if isinstance(self.blobs, LocalBlobs) else None
        if database is None:
            own = URL.create("sqlite", database=str(_own_database(self.location, local, create)))
        self.database = Database(own if database is None else database, create=create)
        place = local or cache_folder() / "registry" / self.database.identity
        self.folders = Folders(place / _FOLDERS, self.blobs)

    def add(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        scores: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        parent: str | None = None,
        rejected: str | None = None,
    ) -> Version:
        """Keep an adapter under a name. The same bytes under the same name are the same version, judged anew.

        Args:
            folder: The adapter; it is checked as loading would.
            name: Its name.
            scores: Measurements; None takes those of its training. NaN and infinity, which JSON lacks, are left out.
            tags: Words to find it by.
            parent: The version that its training went on from.
            rejected: Why it does not pass; such a version takes no alias.

        Raises:
            ConfigError: A name or tag is none.
            AdapterError: The adapter is damaged.
            RegistryError: The registry cannot be written, or an alias points at a version that is now rejected.
        """
        tags = sorted(set(tags))
        faults = [fault for fault in (name_fault(name), *(name_fault(tag, "tag") for tag in tags)) if fault]
        raise_all(ConfigError, faults, "the adapter cannot be added")
        contents, lineage, own_scores = read_contents(Path(folder))
        lineage["parent"] = self.find(parent).revision if parent is not None else None
        return self.put(contents, lineage, name, own_scores if scores is None else scores, tags, rejected)

    def put(
        self,
        contents: Mapping[str, bytes],
        lineage: Mapping[str, Any],
        name: str,
        scores: Mapping[str, float],
        tags: Sequence[str],
        rejected: str | None,
        *,
        again: bool = True,
    ) -> Version:
        """Keep files that are known to be an adapter's; see :meth:`add`.

        Args:
            contents: The files by name.
            lineage: What they came from.
            name: The name to keep them under.
            scores: Measurements.
            tags: Words to find it by.
            rejected: Why it does not pass.
            again: Whether a version that is there already is judged anew; else it stays as it is.
        """
        self.check_files()
        files = hashes(contents)
        mended = {files[path] for path, data in contents.items() if self.blobs.put(files[path], data)}
        revision = revision_of(files)
        with self.database.writing() as connection:
            if mended:  # their folders may still have the damaged bytes, which were the same file
                rows = connection.execute(select(revisions.c.revision, revisions.c.files)).all()
                self.folders.drop([one for one, its in rows if mended & set(its.values())])
            for path, data in contents.items():
                if not self.blobs.has(files[path]):  # a gc came between; none can while this transaction lasts
                    self.blobs.put(files[path], data)
            if connection.scalar(select(revisions.c.size).where(revisions.c.revision == revision)) is None:
                row = {"revision": revision, "size": sum(map(len, contents.values())), "files": files}
                connection.execute(insert(revisions).values(sealed(row | {"lineage": dict(lineage)})))
            finite = {key: value for key, value in scores.items() if math.isfinite(value)}
            number = _judge(connection, name, revision, finite, tags, rejected, again)
            return queries.find(connection, Reference(name, number))

    def check_files(self) -> None:
        """Refuse files that belong to another registry's database: to this one they would be without an owner.

        Raises:
            RegistryError: They do.
        """
        mine, found = self.database.identity, self.blobs.owner()
        if found is None:
            ours = self._has_rows_of_files()
            found = self.blobs.owner()  # another process may have been first, whose files are these
            if found is None and ours:
                self.blobs.claim(mine)
                return
        if found != mine:
            raise RegistryError(
                f"the files at {self.location} are of {f'the registry {found[:8]}' if found else 'another database'}, "
                f"the database {self.database.engine.url} is of {mine[:8]}; give the registry_database that goes with "
                "the registry"
            )

    def _has_rows_of_files(self) -> bool:
        """Whether the files, which do not say whose they are, are of this database, or none are there."""
        there = self.blobs.sizes().keys()
        with self.database.reading() as connection:
            known = connection.scalars(select(revisions.c.files)).all()
        return not there or any(digest in there for files in known for digest in files.values())

    def find(self, reference: str) -> Version:
        """The version that a reference names (see :mod:`lorafleet.registry.names`).

        Raises:
            ConfigError: The reference is none.
            RegistryError: There is no such name, version, alias or revision.
        """
        parsed = parse_reference(reference)
        with self.database.reading() as connection:
            return queries.find(connection, parsed)

    def versions(self, name: str | None = None, tag: str | None = None) -> list[Version]:
        """All versions, or those of a name or with a tag, by name and number."""
        with self.database.reading() as connection:
            found = queries.every_version(connection, name)
        return [version for version in found if tag is None or tag in version.tags]

    def history(self, name: str, alias: str | None = None) -> list[Move]:
        """Promotions and rollbacks of a name, oldest first."""
        with self.database.reading() as connection:
            return queries.moves_of(connection, name, alias)

    def folder(self, version: Version) -> Path:
        """A folder of the version's files, to load the adapter from. It is the registry's own; change nothing in it.

        Raises:
            RegistryError: A file is missing or damaged.
        """
        return self.folders.lay_out(version)

    def share(self, version: Version, folder: Path) -> None:
        """Let a version's files and those of the folder it was added from be the same on disk, where that can be."""
        if isinstance(self.blobs, LocalBlobs):
            for path, digest in version.files.items():
                self.blobs.share(digest, folder / path)

    def promote(self, reference: str, alias: str = PROD, *, expect: int | Literal["any"] | None = "any") -> Move:
        """Point an alias at a version, if it points where it is expected to.

        Args:
            reference: The version.
            alias: The alias, which is made where missing.
            expect: The version it must point at now, None for one that must not be there yet.

        Raises:
            ConfigError: The alias or reference is none.
            RegistryError: The version is not there or was rejected, or the alias was moved meanwhile.
        """
        if fault := name_fault(alias, "alias"):
            raise ConfigError(fault)
        parsed = parse_reference(reference)
        with self.database.writing() as connection:
            version = queries.find(connection, parsed)
            if version.rejected is not None:
                raise RegistryError(f"{version.label} was rejected and takes no alias: {version.rejected}")
            now = queries.pointed_at(connection, version.name, alias)
            if expect not in ("any", now):
                raise RegistryError(
                    f"{version.name}@{alias} points at {_what(now)}, not at {_what(expect)} as expected: "
                    "it was moved meanwhile; look at it and promote again"
                )
            return _move(connection, "promote", version.name, alias, now, version.number)

    def rollback(self, name: str, alias: str = PROD) -> Move:
        """Point an alias at the version it was promoted from. Rolling back again goes further back.

        Raises:
            RegistryError: There is no such alias, or nothing before it.
        """
        with self.database.writing() as connection:
            now = queries.find(connection, Reference(name, alias=alias)).number
            stack = promoted(queries.moves_of(connection, name, alias))
            if len(stack) < 2:
                raise RegistryError(f"{name}@{alias} has never been at another version than {now}")
            version = queries.find(connection, Reference(name, stack[-2]))
            if version.rejected is not None:
                raise RegistryError(f"{version.label}, to which {alias} would go back, is rejected: {version.rejected}")
            return _move(connection, "rollback", name, alias, now, version.number)


def _own_database(location: str, local: Path | None, create: bool) -> Path:
    """The SQLite file of a registry in a folder.

    Raises:
        ConfigError: It is in an object store, which can hold none.
        RegistryError: No folder can be made.
    """
    if local is None:
        raise ConfigError(f"the registry {location} needs registry_database as well: an object store holds files only")
    try:
        if create:
            local.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"cannot start a registry at {local}: {error.strerror or error}") from error
    return local / _DATABASE


def _judge(
    connection: Connection,
    name: str,
    revision: str,
    scores: Mapping[str, float],
    tags: Sequence[str],
    rejected: str | None,
    again: bool,
) -> int:
    """The version of a revision under a name, made, or judged anew where ``again`` says so."""
    mine = (versions.c.name == name) & (versions.c.revision == revision)
    found = connection.execute(select(versions).where(mine)).mappings().first()
    if found is None:
        number = queries.next_number(connection, name)
        row = {"name": name, "number": number, "revision": revision, "rejected": rejected, "scores": dict(scores)}
        connection.execute(insert(versions).values(sealed(row | {"tags": list(tags), "created": now()})))
        return number
    if not again:
        return int(found["number"])
    pointing = queries.aliases_of(connection, name).get(found["number"], [])
    if rejected is not None and pointing:
        raise RegistryError(
            f"{name}:{found['number']} is {', '.join(pointing)} and cannot be rejected ({rejected}); "
            "roll back or promote another version first"
        )
    row = {key: found[key] for key in ("name", "number", "revision", "created")} | {"rejected": rejected}
    row |= {"scores": {**found["scores"], **scores}, "tags": sorted({*found["tags"], *tags})}
    connection.execute(update(versions).where(mine).values(sealed(row)))
    return int(found["number"])


def _move(connection: Connection, kind: str, name: str, alias: str, before: int | None, after: int) -> Move:
    mine = (aliases.c.name == name) & (aliases.c.alias == alias)
    row = sealed({"name": name, "alias": alias, "number": after})
    connection.execute(insert(aliases).values(row) if before is None else update(aliases).where(mine).values(row))
    move = Move(name, alias, kind, before, after, now())
    connection.execute(insert(moves).values(sealed(asdict(move))))
    return move


def now() -> str:
    """The time, UTC, as rows have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _what(number: int | str | None) -> str:
    return "nothing" if number is None else f"version {number}"
