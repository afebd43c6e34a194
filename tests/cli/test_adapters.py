"""The registry from the command line: for people and for programs, and by name wherever a folder is taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cli.main import main
from tests.registry.adapters import adapter_folder
from tests.tiny import tiny_base_folder


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFLEET_REGISTRY", str(tmp_path / "registry"))
    return tmp_path / "registry"


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    assert main(["adapters", *arguments]) == 0
    text = capsys.readouterr().out
    assert main(["adapters", *arguments, "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


def test_from_add_to_rollback(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, added = run(
        "add", str(adapter_folder(tmp_path / "a", 1)), "--name", "reviews", "--tags", "film", capsys=capsys
    )
    assert "reviews:1 is revision" in text and added["tags"] == ["film"]
    run("add", str(adapter_folder(tmp_path / "b", 2, loss=0.25)), "--name", "reviews", capsys=capsys)
    text, moved = run("promote", "reviews:1", capsys=capsys)
    assert "reviews@prod is reviews:1 (new)" in text and moved["after"] == 1
    assert main(["adapters", "promote", "reviews:2", "--expect", "1"]) == 0
    assert main(["adapters", "promote", "reviews:2", "--expect", "1"]) == 1
    assert "points at version 2, not at version 1" in capsys.readouterr().err
    text, listed = run("list", capsys=capsys)
    assert "reviews:2" in text and "prod" in text and len(listed["versions"]) == 2
    text, shown = run("show", "reviews", capsys=capsys)
    for part in ("reviews:2", "can serve it", "adapter_model.safetensors", "promote: reviews@prod is reviews:2 (was"):
        assert part in text
    assert shown["version"]["lineage"]["base"] == "tiny"
    text, told = run("diff", "reviews:1", "reviews:2", capsys=capsys)
    assert "2 changed" in text and told["scores"] == {"loss": [0.5, 0.25]}
    assert main(["adapters", "rollback", "reviews"]) == 0
    assert "rollback: reviews@prod is reviews:1 (was reviews:2)" in capsys.readouterr().out
    assert "all as they were written" in run("verify", capsys=capsys)[0]
    assert "would be deleted: 0 versions" in run("gc", "--keep", "1", "--dry-run", capsys=capsys)[0]
    assert main(["adapters", "export", "reviews:1", "--output", str(tmp_path / "x.tar")]) == 0
    capsys.readouterr()
    other = str(tmp_path / "other")
    assert "films:1" in run("import", str(tmp_path / "x.tar"), "--name", "films", "--registry", other, capsys=capsys)[0]


def test_rejected_versions_are_listed_with_their_reasons(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "worse than [/prod] on [film] rows"
    add = ["add", str(adapter_folder(tmp_path / "a")), "--name", "reviews", "--rejected", reason]
    assert f"rejected: {reason}" in run(*add, capsys=capsys)[0]
    text, listed = run("list", "reviews", capsys=capsys)
    assert "reviews:1" in text and len(listed["versions"]) == 1
    assert main(["adapters", "list", "reviews:1"]) == 2
    assert "`lorafleet adapters show` takes a version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list"], 1, "there is no registry at"),
        (["add", "nowhere", "--name", "a/b"], 2, "name 'a/b' should begin"),
        (["add", "nowhere"], 2, "name is required"),
        (["add", "nowhere", "--name", "a"], 1, "there is no adapter folder at nowhere"),
        (["promote", "a:x"], 1, "there is no registry"),
        (["diff", "a:1"], 2, "diff compares two versions; given are 1"),
        (["promot"], 2, "No such command 'promot'"),
        (["list", "--rejistry", "x"], 2, "--registry"),
    ],
)
def test_what_is_wrong_is_told(
    registry: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_name_serves_as_an_adapter(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = (tiny_base_folder(tmp_path / name, "llama", seed=seed) for seed, name in enumerate(("one", "two")))
    run_folder = str(tmp_path / "run")
    knobs = ["--data", "sample:movie_polarity", "--max-rows", "8", "--max-steps", "1", "--output-dir", run_folder]
    assert main(["train", "--model", str(base), *knobs]) == 0
    assert main(["adapters", "add", run_folder, "--name", "reviews"]) == 0
    capsys.readouterr()
    ask = ["generate", "--adapter", "reviews", "--prompt", "Hello", "--max-new-tokens", "4", "--json"]
    assert main(ask) == 0
    assert json.loads(capsys.readouterr().out)["adapter"] == "reviews"
    assert main([*ask, "--model", str(other)]) == 1
    error = capsys.readouterr().err
    assert "that it was trained on" in error and error.count("(hash ") == 2
    assert main(["generate", "--adapter", "review", "--prompt", "Hello"]) == 1
    assert "did you mean 'reviews'?" in capsys.readouterr().err
    assert main(["merge", "--adapter", "reviews@prod", "--output-dir", str(tmp_path / "merged")]) == 1
    assert "reviews has no alias 'prod'; it has none" in capsys.readouterr().err
    assert main(["generate", "--adapter", "名" * 100, "--prompt", "Hello"]) == 1  # too long for a file's name
    assert "the registry has no adapter" in capsys.readouterr().err
