"""The quickstart's four steps, on a tiny base: what it makes, that it can be repeated, and what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorafleet
from lorafleet.cli import show
from lorafleet.cli.main import main
from lorafleet.cli.quickstart import KNOBS, REVIEWS, quickstart
from lorafleet.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    load_sections,
)
from lorafleet.errors import CheckpointError
from tests.tiny import tiny_base_folder


def test_its_knobs_are_valid() -> None:
    sections = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig)
    _, data, _, training, _, run = load_sections(sections, KNOBS, {})
    assert (data.data, training.max_steps) == (KNOBS["data"], KNOBS["max_steps"])
    assert run.output_dir == KNOBS["output_dir"]


@pytest.mark.timeout(300)
def test_it_runs_twice_with_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base_folder(tmp_path / "base", "llama")
    knobs = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), "max_steps": 2, "max_eval_rows": 8}
    first = quickstart(**knobs)
    with pytest.raises(CheckpointError, match="holds another run"):  # only its own folder is its to replace
        quickstart(**knobs)
    second = quickstart(**knobs, overwrite=True)
    assert first.adapter_sha256 == second.adapter_sha256
    assert second.evaluation.rows == 500
    assert set(second.evaluation.metrics) == {"base", "adapter"}
    assert set(second.evaluation.p_values) == {"adapter_vs_base", "adapter_vs_majority"}
    assert len(second.generation.answers) == len(REVIEWS)
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 500
    json.dumps(second.as_dict())
    show.quickstart(second)
    shown = capsys.readouterr().out
    for part in ("accuracy", "always negative", REVIEWS[0], second.adapter_sha256, "lorafleet inspect"):
        assert part in shown


@pytest.mark.parametrize(
    ("flags", "overwrite"),
    [
        ([], True),
        (["--no-overwrite"], False),
        (["--output", "elsewhere"], None),
        (["--output", "elsewhere", "--overwrite-output-dir"], True),
        (["--resume"], None),
        (["--resume", "runs/quickstart/checkpoint-100"], None),
    ],
)
def test_only_its_own_folder_is_replaced(
    flags: list[str], overwrite: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def record(_: Any, **knobs: Any) -> None:
        given.append({name.replace("overwrite_output_dir", "overwrite"): value for name, value in knobs.items()})
        raise CheckpointError("seen enough")

    monkeypatch.setattr(lorafleet, "train", record)
    assert main(["quickstart", *flags]) == 1
    assert given[0].get("overwrite") == overwrite


def test_its_flags_reach_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--max-steps", "0"]) == 2
    assert "max_steps = 0: should be greater than or equal to 1" in capsys.readouterr().err
