"""The registry's database: SQLite by default, PostgreSQL by URL. Writers take turns: each sees what the last did."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from lorafleet.errors import ConfigError, MissingExtraError, RegistryError
from lorafleet.registry.tables import HEAD

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 60
_LOCK = 0x6C6F7261  # PostgreSQL's advisory locks are numbers


class Database:
    """Transactions on the tables of one registry, which are created or brought up to date when it is opened.

    Args:
        url: SQLAlchemy's URL; ``sqlite:///path`` or ``postgresql+psycopg://user@host/name``.

    Raises:
        ConfigError: The URL is none, or of another kind of database.
        MissingExtraError: The database's driver is not installed.
        RegistryError: The database cannot be reached, or was written by a newer release.
    """

    def __init__(self, url: str | URL) -> None:
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        if self.is_sqlite:
            event.listen(self.engine, "connect", _on_connect)
            event.listen(self.engine, "begin", _on_begin)
        with self._told():
            self._bring_up_to_date()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that changes nothing."""
        with self._told(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction; one at a time over all processes. It is undone as a whole when an exception leaves it."""
        connecting = self.engine.execution_options(lorafleet_writes=True).begin()
        with self._told(), connecting as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            yield connection

    def _bring_up_to_date(self) -> None:
        with self.reading() as connection:
            found = _version(connection)
        if found == HEAD:
            return
        if found is not None and found > HEAD:
            raise RegistryError(
                f"the registry's database {self.engine.url} is of format {found}; this release reads {HEAD}. Update it"
            )
        from alembic import command
        from alembic.config import Config

        logging.getLogger("alembic").setLevel(logging.WARNING)
        with self.writing() as connection:
            if _version(connection) != HEAD:  # another process may have been first
                config = Config()
                config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
                config.attributes["connection"] = connection
                command.upgrade(config, HEAD)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the database has to say, as one of our errors."""
        try:
            yield
        except (OperationalError, DBAPIError) as error:
            what = " ".join(str(error.orig).split())
            raise RegistryError(f"the registry's database {self.engine.url} fails: {what}") from error
        except SQLAlchemyError as error:
            raise RegistryError(f"the registry's database {self.engine.url} fails: {error}") from error


def _engine(url: str | URL) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigError(f"registry_database = {str(url)!r}: should be sqlite:///PATH or postgresql+psycopg://…")
        waits = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": _WAIT_SECONDS}} if waits else {}
        return create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"registry_database = {str(url)!r} is no database URL: {error}") from error
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"a registry in {parsed.get_backend_name()} ({error.name})", "postgres") from error


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _on_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself, too late to take turns
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _on_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("lorafleet_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
