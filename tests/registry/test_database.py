"""A registry of an older release is brought up to date, and lives beside what others have in the same database."""

import logging
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

import lorafleet.registry
from lorafleet.errors import RegistryError
from lorafleet.registry.registry import Registry
from lorafleet.registry.tables import sealed
from lorafleet.registry.upkeep import verify
from tests.registry.adapters import adapter_folder


def first_format(path: Path) -> None:
    """A database as the first release wrote it, with a name whose third version was promoted and is gone."""
    config = Config()
    config.set_main_option("script_location", str(Path(lorafleet.registry.__file__).parent / "migrations"))
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with create_engine(f"sqlite:///{path}").begin() as connection:
        config.attributes |= {"connection": connection, "version_table": "alembic_version"}
        command.upgrade(config, "0001")
    move = {"name": "reviews", "alias": "prod", "kind": "promote", "before": None, "after": 3, "moved": "then"}
    with sqlite3.connect(path) as connection:
        keys = ", ".join(sealed(move))
        connection.execute(f"INSERT INTO moves ({keys}) VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(sealed(move).values()))


def test_the_first_format_is_brought_up_to_date(tmp_path: Path) -> None:
    first_format(tmp_path / "meta.db")
    for _ in range(2):
        registry = Registry(str(tmp_path / "registry"), f"sqlite:///{tmp_path}/meta.db")
    assert [move.after for move in registry.history("reviews")] == [3]
    assert registry.add(adapter_folder(tmp_path / "run"), "reviews").label == "reviews:4"


def test_another_program_migrates_the_same_database(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "meta.db") as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('v3.2.0.a')")
    registry = Registry(str(tmp_path / "registry"), f"sqlite:///{tmp_path}/meta.db", create=True)
    registry.add(adapter_folder(tmp_path / "run"), "reviews")
    assert verify(registry).versions == 1
    with sqlite3.connect(tmp_path / "meta.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("v3.2.0.a",)]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    Registry(str(tmp_path / "registry"), create=True)
    with sqlite3.connect(tmp_path / "registry" / "registry.db") as connection:
        connection.execute("UPDATE lorafleet_registry_version SET version_num = '9999'")
    with pytest.raises(RegistryError, match="is of format 9999; this release reads"):
        Registry(str(tmp_path / "registry"))
