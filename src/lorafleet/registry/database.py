"""The registry's database: SQLite by default, PostgreSQL by URL. Writers take turns: each sees what the last did."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from lorafleet.errors import ConfigError, MissingExtraError, RegistryError
from lorafleet.registry.tables import HEAD, registry

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 60
_LOCK = 0x6C6F7261  # PostgreSQL's advisory locks are numbers
_VERSION_TABLE = "lorafleet_registry_version"
_OLD_VERSION_TABLE, _OLD_HEAD = "alembic_version", "0001"  # Alembic's own, which any program in the database may use


class Database:
    """Transactions on the tables of one registry, which are created or brought up to date when it is opened.

    Args:
        url: SQLAlchemy's URL; ``sqlite:///path`` or ``postgresql+psycopg://user@host/name``.
        create: Whether to make the tables where there are none.

    Attributes:
        identity: The registry's id, which goes with its rows wherever they are moved.

    Raises:
        ConfigError: The URL is none, or of another kind of database.
        MissingExtraError: The database's driver is not installed.
        RegistryError: There is no registry in it, it cannot be reached, or was written by a newer release.
    """

    def __init__(self, url: str | URL, *, create: bool) -> None:
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        if self.is_sqlite:
            event.listen(self.engine, "connect", _on_connect)
            event.listen(self.engine, "begin", _on_begin)
            if not create and not Path(self.engine.url.database or "").is_file():  # connecting would create it
                raise RegistryError(self._nothing_here())
        self._read = self.engine
        if not self.is_sqlite:
            self._read = self.engine.execution_options(isolation_level="REPEATABLE READ")
        with self._told():
            self._bring_up_to_date(create)
            with self.reading() as connection:
                self.identity: str = connection.execute(select(registry.c.identity)).scalar_one()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that changes nothing, and sees all tables as they are at one instant."""
        with self._told(), self._read.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction; one at a time over all processes. It is undone as a whole when an exception leaves it."""
        options: dict[str, Any] = {"lorafleet_writes": True}
        if not self.is_sqlite:  # what is read after the lock must be newer than the lock
            options["isolation_level"] = "READ COMMITTED"
        with self._told(), self.engine.execution_options(**options).begin() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            yield connection

    def faults(self, connection: Connection) -> list[str]:
        """What SQLite finds wrong with its own file: pages, indexes, rows without those they refer to."""
        if not self.is_sqlite:
            return []
        told = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        lost = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        faults = [f"the database's file: {line}" for line in told if line != "ok"]
        return faults + [f"row {row[1]} of {row[0]} refers to a row of {row[2]} that is not there" for row in lost]

    def _bring_up_to_date(self, create: bool) -> None:
        with self.reading() as connection:
            found = _version(connection)
        if found == HEAD:
            return
        if found is None and not create:
            raise RegistryError(self._nothing_here())
        if found is not None and found > HEAD:
            raise RegistryError(
                f"the registry's database {self.engine.url} is of format {found}; this release reads {HEAD}. Update it"
            )
        from alembic import command
        from alembic.config import Config

        logging.getLogger("alembic").setLevel(logging.WARNING)
        with self.writing() as connection:
            if (found := _version(connection)) == HEAD:  # another process was first
                return
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
            config.attributes |= {"connection": connection, "version_table": _VERSION_TABLE}
            if found == _OLD_HEAD and not inspect(connection).has_table(_VERSION_TABLE):
                command.stamp(config, found)
                # An older release that still runs would go on writing; of this format it says that it is too new.
                connection.execute(text(f"UPDATE {_OLD_VERSION_TABLE} SET version_num = '{HEAD}'"))
            command.upgrade(config, HEAD)

    def _nothing_here(self) -> str:
        where = self.engine.url.database if self.is_sqlite else self.engine.url
        return f"there is no registry at {where}; `lorafleet adapters add` starts one"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the database has to say, as one of our errors."""
        try:
            yield
        except (OperationalError, DBAPIError) as error:
            what = " ".join(str(error.orig).split())
            raise RegistryError(f"the registry's database {self.engine.url} fails: {what}") from error
        except json.JSONDecodeError as error:
            raise RegistryError(
                f"a row of the registry's database {self.engine.url} was changed ({error}); "
                "`lorafleet adapters verify` says which"
            ) from error
        except SQLAlchemyError as error:
            raise RegistryError(f"the registry's database {self.engine.url} fails: {error}") from error


def _engine(url: str | URL) -> Engine:
    shown = re.sub("[^/]*@", "***@", str(url))  # no password, not even of what is no URL
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigError(f"registry_database = {shown!r}: should be sqlite:///PATH or postgresql+psycopg://…")
        waits = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": _WAIT_SECONDS}} if waits else {}
        return create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"registry_database = {shown!r} is no database URL: {error}") from error
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"a registry in {parsed.get_backend_name()} ({error.name})", "postgres") from error


def _version(connection: Connection) -> str | None:
    """The newest migration that was run; None where there is no registry."""
    there = inspect(connection)
    if there.has_table(_VERSION_TABLE):
        table = _VERSION_TABLE
    elif there.has_table(_OLD_VERSION_TABLE) and there.has_table("revisions"):
        table = _OLD_VERSION_TABLE
    else:
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {table}")).scalar()
    return found


def _on_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself, too late to take turns
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _on_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("lorafleet_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
