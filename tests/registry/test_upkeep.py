"""A flipped bit anywhere is found; what an alias needs is never deleted, and nothing is that somebody is adding."""

import os
import sqlite3
from pathlib import Path

import pytest

from lorafleet.errors import RegistryError
from lorafleet.registry.registry import Registry
from lorafleet.registry.upkeep import gc, verify
from tests.registry.adapters import adapter_folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions of a name, prod at the second after the first, and a revision under two names."""
    registry = Registry(str(tmp_path / "registry"), create=True)
    for seed in range(3):
        registry.add(adapter_folder(tmp_path / str(seed), seed), "reviews")
    registry.add(tmp_path / "0", "films")
    registry.promote("reviews:1")
    registry.promote("reviews:2")
    return registry


def labels(registry: Registry) -> list[str]:
    return [version.label for version in registry.versions()]


def test_a_whole_registry(registry: Registry) -> None:
    found = verify(registry)
    assert (found.revisions, found.versions, found.aliases, found.unused) == (3, 4, 1, 0)
    assert found.bytes == sum(registry.blobs.sizes().values())


def test_a_flipped_bit_in_any_file_is_found(registry: Registry, tmp_path: Path) -> None:
    for path in (tmp_path / "registry" / "blobs").iterdir():
        good = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(RegistryError, match=f"{path.name} is damaged"):
            verify(registry)
        path.unlink()
        with pytest.raises(RegistryError, match=f"{path.name} is missing"):
            verify(registry)
        path.write_bytes(good)
    verify(registry)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE versions SET scores = '{\"loss\": 0.4}' WHERE number = 2",
        "UPDATE versions SET rejected = 'x' WHERE number = 3",
        "UPDATE revisions SET size = size + 1",
        "UPDATE revisions SET lineage = replace(lineage, 'tiny', 'tinz')",
        "UPDATE revisions SET files = replace(files, 'tokenizer', 'tokenizes')",
        "UPDATE aliases SET number = 3",
        "UPDATE moves SET after = 3 WHERE id = 2",
    ],
)
def test_a_changed_row_is_found(registry: Registry, tmp_path: Path, change: str) -> None:
    with sqlite3.connect(tmp_path / "registry" / "registry.db") as connection:
        assert connection.execute(change).rowcount > 0
    with pytest.raises(RegistryError, match="was changed"):
        verify(registry)


@pytest.mark.parametrize("value", ["'z' || scores", "CAST(x'ff' || scores AS TEXT)"])
def test_a_row_that_cannot_be_read_is_named(registry: Registry, tmp_path: Path, value: str) -> None:
    with sqlite3.connect(tmp_path / "registry" / "registry.db") as connection:
        connection.execute(f"UPDATE versions SET scores = {value} WHERE number = 2")
    with pytest.raises(RegistryError, match="the registry's database .*"):
        registry.versions()
    with pytest.raises(RegistryError, match="the row reviews:2 of versions was changed and cannot be read"):
        verify(registry)


def test_rows_that_were_lost_are_missed(registry: Registry, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "registry" / "registry.db") as connection:
        connection.execute("DELETE FROM revisions WHERE rowid = 1")
    with pytest.raises(RegistryError, match="refers to a row of revisions that is not there"):
        verify(registry)


def test_what_is_left_of_a_missing_file_is_not_called_damaged(registry: Registry) -> None:
    version = registry.find("reviews")
    registry.folder(version)
    registry.blobs.delete(version.files["adapter_model.safetensors"])
    with pytest.raises(RegistryError, match="adapter_model.safetensors of revision .* is missing") as told:
        verify(registry)
    assert "delete its folder" not in str(told.value)


def test_a_damaged_copy_that_would_be_loaded_is_found(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no second names here")

    monkeypatch.setattr("os.link", refuse)
    laid = registry.folder(registry.find("reviews")) / "adapter_config.json"
    verify(registry)
    laid.write_bytes(laid.read_bytes() + b" ")
    with pytest.raises(RegistryError, match=r"adapter_config.json differs .*; delete its folder"):
        verify(registry)


def test_an_alias_that_no_move_explains_is_found(registry: Registry, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "registry" / "registry.db") as connection:
        connection.execute("DELETE FROM aliases")
    with pytest.raises(RegistryError, match="reviews@prod is at version None, but was last moved to 2"):
        verify(registry)


def test_gc_deletes_nothing_that_is_kept(registry: Registry) -> None:
    found = gc(registry)
    assert (found.versions, found.revisions, found.files) == ((), (), 0)
    assert verify(registry).versions == 4


def test_gc_keeps_what_aliases_need(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="reviews:1 is needed by reviews@prod"):
        gc(registry, ["reviews:3", "reviews:1"])
    assert len(labels(registry)) == 4
    looked = gc(registry, keep=0, dry_run=True)
    assert labels(registry) == ["films:1", "reviews:1", "reviews:2", "reviews:3"]
    found = gc(registry, keep=0)
    assert (found.versions, found.files, found.bytes) == (looked.versions, looked.files, looked.bytes)
    assert found.versions == ("films:1", "reviews:3")
    assert labels(registry) == ["reviews:1", "reviews:2"]
    assert verify(registry).unused == 0
    assert registry.rollback("reviews").after == 1


def test_a_number_is_not_given_twice(registry: Registry, tmp_path: Path) -> None:
    registry.promote("reviews:3", "canary")
    registry.promote("reviews:2", "canary")
    registry.promote("reviews:1", "canary")
    gc(registry, ["reviews:3"])
    assert registry.add(adapter_folder(tmp_path / "new", 9), "reviews").label == "reviews:4"
    gc(registry, ["reviews:4", "films:1"])
    assert registry.add(tmp_path / "new", "reviews").label == "reviews:5"
    assert registry.add(tmp_path / "new", "films").label == "films:2"
    assert {move.kind for move in registry.history("reviews")} == {"promote"}
    verify(registry)


def test_folders_that_a_killed_gc_left_go(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third, kept = registry.folder(registry.find("reviews:3")), registry.folder(registry.find("reviews:1"))
    with monkeypatch.context() as patch:
        patch.setattr("lorafleet.registry.folders.shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gc(registry, ["reviews:3"])
    (left,) = set(third.parent.iterdir()) - {kept}
    assert left.name.endswith(".tmp")
    again = registry.folder(registry.add(tmp_path / "2", "again"))
    assert {path.name for path in again.iterdir()} == set(registry.find("again").files)
    os.utime(left, (0, 0))
    gc(registry, ["again"])
    assert set(third.parent.iterdir()) == {kept}


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_gc_deletes_what_killed_writers_left(registry: Registry, tmp_path: Path) -> None:
    blobs = tmp_path / "registry" / "blobs"
    (blobs / ("f" * 64)).write_bytes(b"added, never committed")
    (blobs / f".{'e' * 64}.0a.tmp").write_bytes(b"being written")
    (blobs / f".{'d' * 64}.0b.tmp").write_bytes(b"left behind")
    os.utime(blobs / f".{'d' * 64}.0b.tmp", (0, 0))
    (blobs / "notes.txt").write_text("somebody's own")
    assert verify(registry).unused == 4
    assert gc(registry).files == 2
    left = {path.name[:2] for path in blobs.iterdir()} & {"ff", ".e", ".d", "no"}
    assert left == {".e", "no"}


def test_files_that_gc_takes_during_an_add_are_written_again(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, folder = registry.database.writing, adapter_folder(tmp_path / "new", 9)

    def after_a_gc() -> object:
        monkeypatch.setattr(registry.database, "writing", writing)
        assert gc(Registry(registry.location)).files > 0
        return writing()

    monkeypatch.setattr(registry.database, "writing", after_a_gc)
    registry.add(folder, "new")
    assert verify(registry).versions == 5
