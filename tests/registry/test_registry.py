"""Adapters are kept as they were, found by name, and moved by alias; what cannot be is refused and changes nothing."""

import shutil
from pathlib import Path

import pytest

from lorafleet.errors import AdapterError, ConfigError, RegistryError
from lorafleet.files.adapter import load_adapter
from lorafleet.registry.registry import Registry
from lorafleet.registry.upkeep import gc, verify
from tests.registry.adapters import TOKENIZER, adapter_folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"), create=True)


def bytes_of(registry: Registry) -> int:
    return sum(registry.blobs.sizes().values())


def test_an_adapter_comes_back_as_it_was(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "run")
    version = registry.add(folder, "reviews", tags=["film", "film", "en"])
    assert (version.label, version.tags, version.scores) == ("reviews:1", ("en", "film"), {"loss": 0.5})
    assert version.lineage["base_weights_hash"] == "b" * 64
    assert version.lineage["deployable"]["vllm"] == []
    back = registry.folder(registry.find("reviews"))
    kept = {path.name for path in back.iterdir()}
    assert kept == {path.name for path in folder.iterdir()} - {"loss.png"}
    assert all((back / name).read_bytes() == (folder / name).read_bytes() for name in kept)
    assert load_adapter(back).tensors.keys() == load_adapter(folder).tensors.keys()


def test_equal_bytes_are_one_revision(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "run")
    first = registry.add(folder, "reviews", scores={"loss": 0.5})
    before = bytes_of(registry)
    again = registry.add(folder, "reviews", scores={"accuracy": 0.9}, tags=["film"])
    other = registry.add(folder, "films")
    assert (again.label, again.scores, again.tags) == (first.label, {"loss": 0.5, "accuracy": 0.9}, ("film",))
    assert (other.label, other.revision) == ("films:1", first.revision)
    assert bytes_of(registry) == before


def test_files_in_common_are_kept_once(registry: Registry, tmp_path: Path) -> None:
    registry.add(adapter_folder(tmp_path / "a", seed=1), "a")
    before = bytes_of(registry)
    second = registry.add(adapter_folder(tmp_path / "b", seed=2), "b")
    assert bytes_of(registry) - before < second.size - len(TOKENIZER)


def test_a_folder_shares_its_files_with_the_registry(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    version = registry.add(folder, "reviews")
    registry.share(version, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name, digest in version.files.items():
        assert (folder / name).samefile(tmp_path / "registry" / "blobs" / digest)
    registry.share(version, folder)  # a second time changes nothing
    shutil.rmtree(folder)
    verify(registry)


def test_a_folder_stays_a_copy_where_files_have_one_name(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no second names here")

    folder = adapter_folder(tmp_path / "run")
    version = registry.add(folder, "reviews")
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr("os.link", refuse)
    registry.share(version, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert load_adapter(folder).tensors.keys() == load_adapter(registry.folder(version)).tensors.keys()


def test_versions_are_numbered_and_found(registry: Registry, tmp_path: Path) -> None:
    for seed in range(3):
        registry.add(adapter_folder(tmp_path / str(seed), seed), "reviews")
    third = registry.find("reviews:3")
    assert registry.find("reviews") == third
    assert registry.find(f"sha256:{third.revision[:10]}") == third
    assert [version.label for version in registry.versions()] == ["reviews:1", "reviews:2", "reviews:3"]
    registry.promote("reviews:2")
    assert registry.find("reviews") == registry.find("reviews@prod") == registry.find("reviews:2")
    assert registry.find("reviews:2").aliases == ("prod",)
    assert registry.versions(tag="none") == []


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("review", "has no adapter 'review'; did you mean 'reviews'?"),
        ("reviews:7", "reviews has no version 7; it has 1"),
        ("reviews@prod", "reviews has no alias 'prod'; it has canary"),
        ("sha256:00000000", "has no revision sha256:00000000"),
    ],
)
def test_what_is_not_there_is_named(registry: Registry, tmp_path: Path, reference: str, message: str) -> None:
    registry.add(adapter_folder(tmp_path / "run"), "reviews")
    registry.promote("reviews:1", "canary")
    with pytest.raises(RegistryError, match=message):
        registry.find(reference)


def test_promotion_is_a_compare_and_set(registry: Registry, tmp_path: Path) -> None:
    for seed in range(3):
        registry.add(adapter_folder(tmp_path / str(seed), seed), "reviews")
    assert registry.promote("reviews:1", expect=None).before is None
    with pytest.raises(RegistryError, match="reviews@prod points at version 1, not at nothing as expected"):
        registry.promote("reviews:2", expect=None)
    assert registry.promote("reviews:2", expect=1).before == 1
    with pytest.raises(RegistryError, match="points at version 2, not at version 1 as expected"):
        registry.promote("reviews:3", expect=1)
    assert registry.find("reviews@prod").number == 2
    assert [(move.kind, move.before, move.after) for move in registry.history("reviews", "prod")] == [
        ("promote", None, 1),
        ("promote", 1, 2),
    ]


def test_rolling_back_goes_back_step_by_step(registry: Registry, tmp_path: Path) -> None:
    for seed in range(3):
        registry.add(adapter_folder(tmp_path / str(seed), seed), "reviews")
        registry.promote(f"reviews:{seed + 1}")
    registry.promote("reviews:3")  # again, which is no step
    assert registry.rollback("reviews").after == 2
    assert registry.rollback("reviews").after == 1
    with pytest.raises(RegistryError, match="reviews@prod has never been at another version than 1"):
        registry.rollback("reviews")
    assert registry.promote("reviews:3").before == 1
    assert registry.rollback("reviews").after == 1


def test_a_rejected_version_is_kept_and_takes_no_alias(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "run")
    registry.add(folder, "reviews", rejected="accuracy 0.6 is below 0.8")
    with pytest.raises(RegistryError, match="reviews:1 was rejected and takes no alias: accuracy 0.6 is below 0.8"):
        registry.promote("reviews:1")
    with pytest.raises(RegistryError, match="every version of reviews was rejected; name one, as in reviews:1"):
        registry.find("reviews")
    assert registry.find("reviews:1").rejected == "accuracy 0.6 is below 0.8"
    registry.add(folder, "reviews")  # it passes now
    registry.promote("reviews:1")
    with pytest.raises(RegistryError, match="reviews:1 is prod and cannot be rejected"):
        registry.add(folder, "reviews", rejected="worse")
    assert registry.find("reviews@prod").rejected is None


def test_all_wrong_words_are_told_at_once(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 faults.*name '../up'.*tag '@'"):
        registry.add(adapter_folder(tmp_path / "run"), "../up", tags=["@"])
    with pytest.raises(ConfigError, match="alias 'a/b'"):
        registry.promote("reviews", "a/b")
    assert registry.versions() == []


def test_what_is_no_adapter_is_refused(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "run")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(AdapterError, match="its SHA-256 differs"):
        registry.add(folder, "reviews")
    with pytest.raises(AdapterError, match="there is no adapter folder"):
        registry.add(tmp_path / "nothing", "reviews")
    with pytest.raises(RegistryError, match="has no adapter 'other'"):
        registry.add(adapter_folder(tmp_path / "child"), "reviews", parent="other")
    assert (registry.versions(), bytes_of(registry)) == ([], 0)


def test_lineage_names_the_parent(registry: Registry, tmp_path: Path) -> None:
    parent = registry.add(adapter_folder(tmp_path / "a", 1), "everybody")
    child = registry.add(adapter_folder(tmp_path / "b", 2), "user 7", parent="everybody")
    assert child.lineage["parent"] == parent.revision


def test_adding_again_mends_a_damaged_file(registry: Registry, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "run")
    version = registry.add(folder, "reviews")
    path = tmp_path / "registry" / "blobs" / version.files["adapter_model.safetensors"]
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(RegistryError, match="is damaged: its SHA-256 differs; add the adapter again to mend it"):
        registry.folder(version)
    registry.add(folder, "reviews")
    assert load_adapter(registry.folder(version)).config.r == 2


def test_mending_reaches_the_folder_that_is_loaded(registry: Registry, tmp_path: Path) -> None:
    run = adapter_folder(tmp_path / "run")
    version = registry.add(run, "reviews")
    laid = registry.folder(version) / "adapter_model.safetensors"
    good = laid.read_bytes()
    laid.chmod(0o644)
    laid.write_bytes(b"x" + good[1:])
    registry.add(run, "films")
    assert (registry.folder(version) / "adapter_model.safetensors").read_bytes() == good
    verify(registry)


def test_a_registry_is_not_made_by_looking(tmp_path: Path) -> None:
    for database in (None, f"sqlite:///{tmp_path}/typo.db"):
        with pytest.raises(RegistryError, match="there is no registry at .*; `lorafleet adapters add` starts one"):
            Registry(str(tmp_path / "nothing"), database)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [True, False])
def test_files_of_another_registry_are_left_alone(registry: Registry, tmp_path: Path, told: bool) -> None:
    run = adapter_folder(tmp_path / "run")
    registry.add(run, "reviews")
    if not told:  # as the first format left them
        (tmp_path / "registry" / "registry.id").unlink()
    before = registry.blobs.sizes()
    wrong = Registry(registry.location, f"sqlite:///{tmp_path}/other.db", create=True)
    for work in (lambda: gc(wrong), lambda: wrong.add(run, "reviews")):
        with pytest.raises(RegistryError, match="give the registry_database that goes with the registry"):
            work()
    assert registry.blobs.sizes() == before
    verify(registry)
    registry.add(run, "films")


def test_scores_that_are_no_numbers_are_left_out(registry: Registry, tmp_path: Path) -> None:
    scores = {"loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5}
    assert registry.add(adapter_folder(tmp_path / "run"), "reviews", scores=scores).scores == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "url", ["mysql://host/x", "no url", "sqlite", "postgres://me:hidden@host/x", "postgresql:/me:hidden@x"]
)
def test_other_databases_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="registry_database") as refused:
        Registry(str(tmp_path), url, create=True)
    assert "hidden" not in str(refused.value)


def test_an_object_store_with_a_database_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="needs registry_database as well"):
        Registry("memory://adapters", create=True)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Registry("nosuch://adapters", create=True)
    registry = Registry("memory://adapters", f"sqlite:///{tmp_path}/meta.db", create=True)
    folder = adapter_folder(tmp_path / "run")
    version = registry.add(folder, "reviews")
    assert load_adapter(registry.folder(version)).config.r == 2
    assert verify(registry).files == len(version.files)
    registry.blobs.delete(version.files["adapter_config.json"])
    with pytest.raises(RegistryError, match="adapter_config.json of revision .* is missing"):
        verify(registry)
    registry.add(folder, "reviews")
    assert verify(registry).versions == 1
