"""``advise``: settings that can be run, that follow from the facts, and that leave alone what the user has set."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lorafleet
from lorafleet.advice.cautions import cautions
from lorafleet.advice.facts import Facts
from lorafleet.advice.rules import decide
from lorafleet.advice.run import SECTIONS
from lorafleet.cli.commands import app
from lorafleet.errors import ConfigError, DataError
from lorafleet.training.run import SECTIONS as TRAIN
from tests.training.test_resume import make_place

FACTS = Facts(
    model="some/model",
    architecture="llama",
    parameters=135_000_000,
    base_bytes=540_000_000,
    parameters_per_rank=300_000,
    hidden_size=576,
    context=2048,
    device="cpu",
    free_bytes=8 << 30,
    task="chat",
    rows=1000,
    held_out=100,
    test=100,
    mean_tokens=80,
    longest=300,
    trained_tokens=30_000,
    truncated=0,
    labels={},
    repeated_prompts=0.0,
    warnings=(),
)
DEFAULTS: dict[str, Any] = {name: field.default for section in SECTIONS for name, field in section.model_fields.items()}


def chosen(goal: str = "quality", given: dict[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
    return {one.knob: one.value for one in decide(replace(FACTS, **facts), goal, given or {}, DEFAULTS)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("advise"))


def test_the_learning_rate_follows_width_and_length_of_the_run() -> None:
    assert chosen()["learning_rate"] == pytest.approx(5e-4 * (2000 / 576) ** 0.781, rel=0.05)
    assert chosen(given={"max_steps": 60})["learning_rate"] == pytest.approx(
        1.5 * 5e-4 * (2000 / 576) ** 0.781, rel=0.05
    )
    assert chosen(hidden_size=8192)["learning_rate"] == 2e-4  # no lower than the default
    assert chosen(architecture="qwen3")["learning_rate"] < chosen()["learning_rate"]


def test_rank_epochs_and_batch_follow_the_rows() -> None:
    assert [chosen(trained_tokens=n)["r"] for n in (10_000, 4_000_000, 9_000_000, 10**9)] == [8, 16, 32, 64]
    assert [chosen(rows=n)["num_train_epochs"] for n in (100, 1000, 5000, 50_000)] == [5, 3, 2, 1]
    assert [chosen(rows=n, mean_tokens=30)["per_device_train_batch_size"] for n in (100, 1000, 50_000)] == [4, 8, 16]
    assert chosen(truncated=3)["max_length"] == 2048
    assert "max_length" not in chosen()


def test_goals_differ() -> None:
    assert chosen("memory")["per_device_train_batch_size"] * chosen("memory")["gradient_accumulation_steps"] == 8
    assert chosen("memory")["gradient_checkpointing"] and "gradient_checkpointing" not in chosen()
    assert chosen("speed")["num_train_epochs"] < chosen()["num_train_epochs"]
    assert {chosen(goal)["r"] for goal in ("memory", "edge", "many_tasks")} == {4}


def test_what_is_given_stays() -> None:
    given = {"r": 3, "learning_rate": 5e-5, "max_steps": 40}
    found = chosen(given=given)
    assert not {"r", "learning_rate", "max_steps", "num_train_epochs"} & set(found)
    assert found["lora_alpha"] == 6
    assert chosen(given={"use_rslora": True, "r": 16})["lora_alpha"] == 8  # a scale of 2 there, too
    assert not {"eval_strategy", "eval_steps", "early_stopping_patience"} & set(chosen(given={"eval_strategy": "no"}))
    assert (
        "early_stopping_patience" in (epoch := chosen(given={"eval_strategy": "epoch"})) and "eval_steps" not in epoch
    )
    large = chosen("memory", given={"per_device_train_batch_size": 32})
    assert "gradient_accumulation_steps" not in large


def test_cautions_name_what_goes_wrong() -> None:
    def told(**facts: Any) -> str:
        return "\n".join(cautions(replace(FACTS, **facts), "edge"))

    assert "few" in told(rows=20) and "few" not in told()
    assert "90% of the rows have one label" in told(labels={"a": 90, "b": 10})
    assert "1 labels have fewer than 5 rows" in told(labels={"a": 9, "b": 2})
    assert "30 held-out rows" in told(held_out=30) and "held-out" not in told(held_out=0)
    assert "the base alone takes 16.0 GB, and 8.6 GB are free (cpu)" in told(base_bytes=16_000_000_000)
    assert "up to 3000 tokens, the model takes 2048" in told(longest=3000) and "the model takes" not in told()
    assert "50% of the rows share their prompt" in told(repeated_prompts=0.5)
    assert "llama.cpp" in told() and told(warnings=("2 rows were cut",)).startswith("2 rows were cut\n")


def test_the_advice_trains(place: Path, tmp_path: Path) -> None:
    arguments = ["advise", "--model", str(place / "base"), "--data", str(place / "rows.jsonl"), "--device", "cpu"]
    shown = CliRunner().invoke(app, [*arguments, "--max-steps", "20", "--valid-fraction", "0.2"])
    assert shown.exit_code == 0, shown.output
    file = tmp_path / "run.yml"
    file.write_text(shown.stdout, encoding="utf-8")
    assert shown.stdout.count("  # ") >= 9 and "early_stopping_patience: 3" in shown.stdout
    result = lorafleet.train(file, output_dir=str(tmp_path / "out"))
    assert 10 <= result.steps <= 20 and result.eval_loss is not None
    # One file serves all the commands that it speaks of.
    (method,) = lorafleet.estimate(file, methods="lora").methods
    assert method.trainable_parameters == result.trainable_parameters and method.steps == 20
    assert lorafleet.advise(file).given["learning_rate"] == lorafleet.advise(file).config["learning_rate"]
    space = {"space": {"r": [2, 4]}, "max_steps": 2, "pruning": False, "output_dir": str(tmp_path / "search")}
    assert len(lorafleet.tune(file, **space).trials) == 2


def test_the_file_holds_what_python_gets(place: Path, tmp_path: Path) -> None:
    advice = lorafleet.advise(model=str(place / "base"), data=str(place / "rows.jsonl"), device="cpu")
    file = tmp_path / "run.yml"
    file.write_text(advice.yaml, encoding="utf-8")
    from lorafleet.config.load import load_sections

    assert load_sections(TRAIN, file, {}) == load_sections(TRAIN, advice.config, {})
    assert advice.as_dict()["config"] == advice.config and advice.facts.rows == 40 - advice.facts.held_out


def test_faults(place: Path) -> None:
    with pytest.raises(ConfigError, match="goal"):
        lorafleet.advise(model=str(place / "base"), data=str(place / "rows.jsonl"), goal="fame")
    with pytest.raises(DataError, match="there is no file or folder"):
        lorafleet.advise(model=str(place / "base"), data=str(place / "none.jsonl"))
