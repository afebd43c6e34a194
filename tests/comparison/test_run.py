"""``compare`` from rows to report, on a tiny base."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lorafleet
from lorafleet.comparison import run
from lorafleet.comparison.jobs import Job
from lorafleet.comparison.result import CompareResult
from lorafleet.comparison.run import compare
from lorafleet.config.compare import CompareConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.config.yaml_text import dump_mapping
from lorafleet.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from lorafleet.files.atomic import write_json
from lorafleet.methods.method import Method
from tests.training.test_resume import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("compare"))


def settings(place: Path, **knobs: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(place / "base"),
        "data": str(place / "rows.jsonl"),
        "valid_fraction": 0.2,
        "output_dir": str(place / "out"),
        "methods": "lora:r=2,prefix:num_virtual_tokens=2",
        "max_steps": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
        "small_rows": [4, 8, 100],
        "new_tokens": 2,
        "tune_lr": False,
        **knobs,
    }


@pytest.fixture(scope="module")
def first(place: Path) -> CompareResult:
    return compare(settings(place))


def test_every_cell_is_measured(place: Path, first: CompareResult) -> None:
    assert [row["kind"] for row in first.methods] == ["lora", "prefix_tuning"]
    assert (first.split, first.rows, first.failed) == ("valid", 8, {})
    for row in first.methods:
        assert row["quality"]["loss"] != first.base["quality"]["loss"]
        low, high = row["intervals"]["loss"]
        assert low <= row["quality"]["loss"] <= high
        numbers = ["trainable_parameters", "training_peak_bytes", "training_tokens_per_second", "storage_bytes"]
        assert all(row[name] > 0 for name in [*numbers, "padded_tokens_per_second"])
        assert [gap["rows"] for gap in row["gaps"]] == [4, 8, 32]
        assert all(gap["train_loss"] > 0 and gap["eval_loss"] > 0 for gap in row["gaps"])
        assert row["speed"]["batch"] > 0 and (row["merged_speed"] is not None) == (row["kind"] == "lora")
    assert sum(row["best"] for row in first.methods) == 1
    assert first.merit == "chrf" and all("p_values" in row for row in first.methods)


def test_storage_is_what_lies_in_the_folder(place: Path, first: CompareResult) -> None:
    (lora,) = (place / "out" / "methods").glob("lora-*")
    kept = ("adapter_model.safetensors", "adapter_config.json", "lorafleet.json")
    assert first.methods[0]["storage_bytes"] == sum((lora / "train" / name).stat().st_size for name in kept)


def test_quality_is_what_eval_finds(place: Path, first: CompareResult) -> None:
    (lora,) = (place / "out" / "methods").glob("lora-*")
    found = lorafleet.evaluate(adapter=str(lora / "train"), data=str(place / "rows.jsonl"), split="valid", device="cpu")
    assert found.metrics["adapter"]["loss"] == pytest.approx(first.methods[0]["quality"]["loss"], rel=1e-5)
    assert found.metrics["base"]["loss"] == pytest.approx(first.base["quality"]["loss"], rel=1e-5)


def test_the_report_says_it(place: Path, first: CompareResult) -> None:
    out = place / "out"
    text = (out / "report.md").read_text()
    for title in ("Parameters and memory", "Training speed", "Inference speed", "Storage", "Quality"):
        assert f"## {title}\n" in text
    assert f"{first.methods[0]['trainable_parameters']:,}" in text
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 7 and "<script" not in page and "src=" not in page
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(first.as_dict()))


def test_the_same_call_again_measures_nothing_and_another_method_joins(place: Path, first: CompareResult) -> None:
    parts = {path: path.stat().st_mtime_ns for path in (place / "out").glob("methods/*/use.json")}
    again = compare(settings(place, methods="lora:r=2,bottleneck:bottleneck_size=2"))
    assert {row["kind"] for row in again.methods} == {"lora", "bottleneck", "prefix_tuning"}
    assert all(row["padded_tokens_per_second"] > 0 for row in again.methods)
    assert all(path.stat().st_mtime_ns == then for path, then in parts.items())


def test_other_settings_are_refused_by_name(place: Path, first: CompareResult) -> None:
    with pytest.raises(CheckpointError, match=r"training\.max_steps: 4 then, 5 now"):
        compare(settings(place, max_steps=5))


def test_changed_rows_are_refused(place: Path, first: CompareResult) -> None:
    rows = place / "rows.jsonl"
    text = rows.read_text()
    try:
        rows.write_text("".join(text.splitlines(keepends=True)[1:]))
        with pytest.raises(CheckpointError, match="rows: "):
            compare(settings(place))
    finally:
        rows.write_text(text)


def test_what_was_trained_outlives_a_later_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = settings(place, output_dir=str(place / "later"), small_rows=0, methods="lora:r=2")
    with monkeypatch.context() as broken:
        broken.setattr("lorafleet.comparison.run.padded_speed", _broken)
        assert "ValueError: out of luck" in compare(knobs).failed["lora:r=2"]
    trained = list((place / "later").glob("methods/*/train.json"))
    then = [path.stat().st_mtime_ns for path in trained]
    assert [row["name"] for row in compare(knobs).methods] == ["lora:r=2"]
    assert [path.stat().st_mtime_ns for path in trained] == then and then


def _broken(job: Any) -> dict[str, Any]:
    raise ValueError("out of luck")


@pytest.mark.slow
def test_a_method_that_fails_is_a_row_with_its_error(place: Path) -> None:
    knobs = settings(place, output_dir=str(place / "failing"), small_rows=0)
    result = compare(knobs | {"methods": "lora:r=2,learning_rate=1e30,lora:r=4"})
    assert [row["name"] for row in result.methods] == ["lora:r=4"]
    assert "stopped in step" in result.failed["lora:r=2,learning_rate=1e30"]
    assert "lora:r=2,learning_rate=1e30 could not be measured" in (place / "failing" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_comparison_goes_on(place: Path) -> None:
    """SIGINT in the middle of a training, as Ctrl-C sends it: no step is lost, and none is taken twice."""
    knobs = settings(place, output_dir=str(place / "stopped"), methods="lora:r=2", max_steps=300, small_rows=0)
    file = place / "stopped.yml"
    file.write_text(dump_mapping(knobs), encoding="utf-8")
    command = [sys.executable, "-m", "lorafleet", "compare", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any(
        path.read_text().count("\n") > 20 for path in (place / "stopped").glob("methods/*/train/metrics.jsonl")
    ):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == Interrupted.exit_code and "the same command goes on from here" in told
    assert not list((place / "stopped").glob("methods/*/train.json"))
    (row,) = compare(file).methods
    assert [one["step"] for one in row["curve"] if "loss" in one] == list(range(1, 301))


@pytest.mark.slow
def test_learning_rates_are_found(place: Path) -> None:
    knobs = settings(place, output_dir=str(place / "rates"), small_rows=0, tune_lr=True, lr_runs=2, lr_steps=3)
    (row,) = compare(knobs | {"methods": "lora:r=2"}).methods
    runs = row["rates"]["runs"]
    assert 3 <= len(runs) <= 6 and row["rates"]["steps"] == 3  # two, and more while the best is at an end
    best = min(range(len(runs)), key=lambda i: runs[i]["loss"])
    assert row["rates"]["rate"] == runs[best]["rate"]
    assert row["rates"]["at_end"] == (best in (0, len(runs) - 1))
    assert len(runs) == 6 or not row["rates"]["at_end"]


def test_a_rate_that_does_not_hold_gives_way_to_the_next_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        {"rate": 0.01, "loss": 0.9},
        {"rate": 0.1, "loss": 0.6},
        {"rate": 1.0, "loss": 0.5},
        {"rate": 10.0, "loss": None},
    ]
    parts: dict[Any, dict[str, Any]] = {
        run.search_rate: {"rate": 1.0, "runs": runs},
        1.0: {"failed": "stopped in step 3"},
        0.1: {"metrics": {"loss": 0.8}},
        0.01: {"metrics": {"loss": 0.95}},
    }

    def run_job(function: Any, path: Path, job: Job, *arguments: float) -> dict[str, Any]:
        (tmp_path / "train").mkdir(exist_ok=True)
        write_json(path, parts[arguments[0] if arguments else function])
        return dict(json.loads(path.read_text()))

    monkeypatch.setattr(run, "run_job", run_job)
    settings: Any = (None,) * 7
    job = Job(settings, Method("lora", "lora", None, TrainingConfig()), tmp_path, 4)
    assert run._train(job, CompareConfig()) == (0.01, parts[0.01])
    assert json.loads((tmp_path / "rate.json").read_text())["given_up"] == [1.0, 0.1]
    parts[0.01] = parts[1.0]
    with pytest.raises(TrainingError, match="stopped in step 3"):
        run._train(job, CompareConfig())
    assert not (tmp_path / "train.json").exists()


def test_faults_are_named_before_anything_is_trained(place: Path) -> None:
    knobs = settings(place, output_dir=str(place / "never"))
    with pytest.raises(ConfigError) as caught:
        compare(knobs | {"methods": "fulll,lora:rang=3,prefix:num_virtual_tokenz=2"})
    assert caught.match("did you mean 'full'") and caught.match("rang") and caught.match("'num_virtual_tokens'")
    with pytest.raises(ConfigError, match="method bitfit: .* has no biases"):
        compare(knobs | {"methods": "bitfit,lora"})
    with pytest.raises(ConfigError, match="method lora:target_modules=nothing"):
        compare(knobs | {"methods": "lora:target_modules=nothing"})
    with pytest.raises(ConfigError, match=r"(?s)gradient_checkpointing works with lora alone.*not -1"):
        compare(knobs | {"methods": "ia3", "gradient_checkpointing": True, "small_rows": -1})
    with pytest.raises(DataError, match="fewer than 2 rows are held out"):
        compare(knobs | {"valid_fraction": 0.0})
    assert not (place / "never").exists()
