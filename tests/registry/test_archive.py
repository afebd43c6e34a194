"""One file carries versions to another registry; a wrong one adds nothing."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from lorafleet.errors import ConfigError, RegistryError
from lorafleet.registry.archive import export_versions, import_versions
from lorafleet.registry.registry import Registry
from lorafleet.registry.upkeep import verify
from tests.registry.adapters import adapter_folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(str(tmp_path / "here"), create=True)
    registry.add(adapter_folder(tmp_path / "a", 1), "reviews", tags=["film"])
    registry.add(adapter_folder(tmp_path / "b", 2), "reviews", rejected="too slow")
    return registry


def test_versions_travel(registry: Registry, tmp_path: Path) -> None:
    done = export_versions(registry, ["reviews:1", "reviews:2", "reviews:1"], tmp_path / "out.tar")
    assert done.versions == ("reviews:1", "reviews:2")
    there = Registry(str(tmp_path / "there"), create=True)
    found = import_versions(there, tmp_path / "out.tar")
    for mine, theirs in zip(registry.versions(), found, strict=True):
        assert (mine.label, mine.revision, mine.rejected, mine.scores, mine.tags, mine.lineage) == (
            theirs.label,
            theirs.revision,
            theirs.rejected,
            theirs.scores,
            theirs.tags,
            theirs.lineage,
        )
    assert import_versions(there, tmp_path / "out.tar") == found
    assert verify(there).versions == 2
    assert [version.label for version in import_versions(there, tmp_path / "out.tar", "films")] == [
        "films:1",
        "films:2",
    ]


def test_what_is_there_stays_as_it_is(registry: Registry, tmp_path: Path) -> None:
    export_versions(registry, ["reviews:1", "reviews:2"], tmp_path / "out.tar")
    registry.add(tmp_path / "a", "reviews", rejected="too old", tags=["mine"])
    registry.add(tmp_path / "b", "reviews")
    registry.promote("reviews:2")
    before = registry.versions()
    assert import_versions(registry, tmp_path / "out.tar") == before == registry.versions()


def test_what_would_unpack_to_more_than_it_is_is_refused(registry: Registry, tmp_path: Path) -> None:
    export_versions(registry, ["reviews:1"], tmp_path / "out.tar")
    with gzip.open(tmp_path / "out.tar.gz", "wb") as file:
        file.write((tmp_path / "out.tar").read_bytes())
    with pytest.raises(RegistryError, match="out.tar.gz is damaged or no export of a registry"):
        import_versions(registry, tmp_path / "out.tar.gz")


def test_no_file_is_replaced(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "out.tar").write_text("mine")
    with pytest.raises(ConfigError, match="out.tar exists; give another --output"):
        export_versions(registry, ["reviews"], tmp_path / "out.tar")
    with pytest.raises(RegistryError, match="cannot write .*nowhere"):
        export_versions(registry, ["reviews"], tmp_path / "nowhere" / "out.tar")


def rewritten(path: Path, change: str) -> Path:
    """The file with one thing changed."""
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    index = json.loads(members["registry.json"])
    blob = next(name for name in members if name != "registry.json")
    if change == "a bit":
        members[blob] = members[blob][:-1] + b"?"
    elif change == "a blob less":
        del members[blob]
    elif change == "no index":
        del members["registry.json"]
    elif change == "a path":
        index["versions"][0]["files"]["../../evil"] = blob.removeprefix("blobs/")
    elif change == "a format":
        index["format"] = 99
    elif change == "a name":
        index["versions"][0]["name"] = "../up"
    elif change == "a type":
        index["versions"][0]["scores"] = ["loss"]
    if "registry.json" in members:
        members["registry.json"] = json.dumps(index).encode()
    with tarfile.open(path.with_name("changed.tar"), "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.with_name("changed.tar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a bit", "differs from its hash"),
        ("a blob less", "is damaged or no export"),
        ("no index", "it is no export of a registry"),
        ("a path", "a revision has no files '../../evil'"),
        ("a format", "has format 99"),
        ("a name", "name '../up'"),
        ("a type", "is damaged or no export"),
    ],
)
def test_a_wrong_file_adds_nothing(registry: Registry, tmp_path: Path, change: str, message: str) -> None:
    export_versions(registry, ["reviews:1"], tmp_path / "out.tar")
    there = Registry(str(tmp_path / "there"), create=True)
    with pytest.raises((RegistryError, ConfigError), match=message):
        import_versions(there, rewritten(tmp_path / "out.tar", change))
    assert (there.versions(), there.blobs.sizes()) == ([], {})


@pytest.mark.parametrize("data", [b"", b"\x00" * 2048, b"text"])
def test_what_is_no_tar(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(RegistryError, match="x.tar"):
        import_versions(Registry(str(tmp_path / "there"), create=True), tmp_path / "x.tar")


def test_one_name_for_several_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.add(tmp_path / "a", "films")
    export_versions(registry, ["reviews:1", "films"], tmp_path / "out.tar")
    with pytest.raises(ConfigError, match="adapters of 2 names"):
        import_versions(registry, tmp_path / "out.tar", "one")
