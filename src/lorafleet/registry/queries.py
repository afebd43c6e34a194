"""What is read from the tables, inside a transaction."""

from sqlalchemy import Connection, RowMapping, func, select

from lorafleet.errors import RegistryError, did_you_mean
from lorafleet.registry.names import Reference
from lorafleet.registry.tables import DELETED, aliases, moves, revisions, versions
from lorafleet.registry.version import Move, Version

PROD = "prod"
"""The alias that a bare name stands for."""

_WHOLE = select(versions, revisions.c.size, revisions.c.files, revisions.c.lineage).join(revisions)


def find(connection: Connection, reference: Reference) -> Version:
    """The version that a reference names.

    Raises:
        RegistryError: There is none.
    """
    name, number = reference.name, reference.number
    if reference.revision is not None:
        name, number = _by_revision(connection, reference)
    elif reference.alias is not None:
        number = pointed_at(connection, str(name), reference.alias)
    elif number is None:
        number = pointed_at(connection, str(name), PROD)
        if number is None:
            passed = (versions.c.name == name) & versions.c.rejected.is_(None)
            number = connection.scalar(select(func.max(versions.c.number)).where(passed))
    mine = (versions.c.name == name) & (versions.c.number == number)
    row = connection.execute(_WHOLE.where(mine)).mappings().first()
    if row is None:
        raise RegistryError(_what_is_missing(connection, reference))
    return _as_version(row, aliases_of(connection, row["name"]).get(row["number"], []))


def every_version(connection: Connection, name: str | None = None) -> list[Version]:
    """All versions, or those of a name, by name and number."""
    query = _WHOLE if name is None else _WHOLE.where(versions.c.name == name)
    rows = connection.execute(query.order_by(versions.c.name, versions.c.number)).mappings().all()
    pointing = {one: aliases_of(connection, one) for one in dict.fromkeys(row["name"] for row in rows)}
    return [_as_version(row, pointing[row["name"]].get(row["number"], [])) for row in rows]


def aliases_of(connection: Connection, name: str) -> dict[int, list[str]]:
    """The aliases of a name by the version they point at."""
    found: dict[int, list[str]] = {}
    query = select(aliases).where(aliases.c.name == name).order_by(aliases.c.alias)
    for row in connection.execute(query).mappings():
        found.setdefault(row["number"], []).append(row["alias"])
    return found


def pointed_at(connection: Connection, name: str, alias: str) -> int | None:
    """The version that an alias points at; None where there is no such alias."""
    mine = (aliases.c.name == name) & (aliases.c.alias == alias)
    number: int | None = connection.scalar(select(aliases.c.number).where(mine))
    return number


def moves_of(connection: Connection, name: str, alias: str | None = None) -> list[Move]:
    """How the aliases of a name, or one of them, have moved, oldest first."""
    query = select(moves).where((moves.c.name == name) & (moves.c.kind != DELETED)).order_by(moves.c.id)
    if alias is not None:
        query = query.where(moves.c.alias == alias)
    keys = Move.__dataclass_fields__
    return [Move(**{key: row[key] for key in keys}) for row in connection.execute(query).mappings()]


def next_number(connection: Connection, name: str) -> int:
    """A version that a name never had. One that gc removed is not given again: it would be other bytes."""
    newest = connection.scalar(select(func.max(versions.c.number)).where(versions.c.name == name))
    ever = connection.scalar(select(func.max(moves.c.after)).where(moves.c.name == name))
    return max(newest or 0, ever or 0) + 1


def _by_revision(connection: Connection, reference: Reference) -> tuple[str | None, int | None]:
    query = select(versions).where(versions.c.revision.startswith(str(reference.revision)))
    rows = connection.execute(query.order_by(versions.c.created, versions.c.name)).mappings().all()
    if len({row["revision"] for row in rows}) > 1:
        raise RegistryError(f"{reference} is the beginning of several revisions; give more digits")
    return (rows[0]["name"], rows[0]["number"]) if rows else (None, None)


def _as_version(row: RowMapping, pointing: list[str]) -> Version:
    same = ("name", "number", "revision", "rejected", "scores", "created", "size", "files", "lineage")
    return Version(**{key: row[key] for key in same}, tags=tuple(row["tags"]), aliases=tuple(pointing))


def _what_is_missing(connection: Connection, reference: Reference) -> str:
    """What there is instead of what was asked for."""
    if reference.revision is not None:
        return f"the registry has no revision {reference}"
    name, known = str(reference.name), connection.scalars(select(versions.c.name).distinct()).all()
    if name not in known:
        return f"the registry has no adapter {name!r}{did_you_mean(name, known)}"
    if reference.alias is not None:
        mine = sorted(alias for found in aliases_of(connection, name).values() for alias in found)
        return f"{name} has no alias {reference.alias!r}; it has {', '.join(mine) or 'none'}"
    numbers = sorted(connection.scalars(select(versions.c.number).where(versions.c.name == name)))
    if reference.number is None:
        return f"every version of {name} was rejected; name one, as in {name}:{numbers[-1]}"
    return f"{name} has no version {reference.number}; it has {', '.join(map(str, numbers))}"
