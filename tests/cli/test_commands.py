"""Every command from end to end on a tiny base: its table for people and its JSON for programs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cli.main import main
from tests.tiny import tiny_base_folder

DATA = ["--data", "sample:movie_polarity", "--max-rows", "12"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("commands")
    base = tiny_base_folder(folder / "base", "llama")
    arguments = ["--model", str(base), "--output-dir", str(folder / "run"), "--max-steps", "3", "--lr", "1e-2"]
    assert main(["train", *arguments, *DATA]) == 0
    return folder


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """The text and the JSON of one command."""
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


def test_train(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = place / "run.yml"
    config.write_text(f"model: {place / 'base'}\ndata: sample:movie_polarity\nmax-rows: 12\nmax_steps: 2\n")
    output = str(place / "second")
    text, result = run(["train", str(config), "--output", output, "--overwrite"], capsys)
    for part in ("loss", "accuracy", "base", "adapter", "2, the adapter of step 2", "12 read, 12 used"):
        assert part in text
    fields = """output_dir adapter steps rows tokens trained_tokens train_loss eval_loss_before eval_loss metrics_before
    metrics total_parameters trainable_parameters tokens_per_second peak_memory_bytes seconds"""
    assert set(fields.split()) <= set(result)
    assert (result["output_dir"], result["steps"]) == (output, 2)
    assert {"read", "used", "rejected", "truncated"} <= set(result["rows"])


def test_the_written_settings_run_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(place / "run" / "lorafleet.yaml"), "--output-dir", str(place / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    weights = [(place / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_folder_with_a_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", str(place / "base"), *DATA, "--output-dir", str(place / "run")]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_eval(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, result = run(["eval", "--adapter", str(place / "run"), *DATA], capsys)
    for part in ("accuracy", "macro F1", "adapter against base", "McNemar", "12 of test"):
        assert part in text
    assert set(result["metrics"]) == {"base", "adapter"}
    assert result["rows"] == 12


def test_generate_streams_one_answer_and_lists_several(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--adapter", str(place / "run"), "--max-new-tokens", "6"]
    text, result = run([*common, "--prompt", "Hello, [world]", "--with-base"], capsys)
    (answer,) = result["answers"]
    assert text == f"{answer['text']}\n\n[base] {answer['base_text']}\n"
    text, result = run([*common, "--prompt", "one", "--prompt", "two"], capsys)
    assert [line for line in text.splitlines() if line.startswith("> ")] == ["> one", "> two"]
    assert all(answer["text"] in text for answer in result["answers"])


def test_merge(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(place / "merged")
    text, result = run(["merge", "--adapter", str(place / "run"), "--output-dir", output, "--overwrite"], capsys)
    assert "merged against adapter" in text
    assert result["logits_difference"] <= result["tolerance"]


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, result = run(["inspect", str(place / "run")], capsys)
    for part in ("adapter parameters", "effective scale", "model.layers.*.self_attn.q_proj", "runs in vllm"):
        assert part in text
    assert result["kind"] == "adapter"
    text, result = run(["inspect", str(place / "base"), "--r", "4", "--target-modules", "attention"], capsys)
    assert (result["kind"], result["lora"]["r"]) == ("model", 4)
    assert f"{result['total_parameters']:,}" in text


def test_data_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = place / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "yes"}\nbroken\n{"text": "bad", "label": "no"}\n')
    arguments = ["data", "inspect", str(rows), "--model", str(place / "base"), "--valid-fraction", "0"]
    text, result = run([*arguments, "--on-bad-rows", "skip"], capsys)
    assert "rows.jsonl:2" in text
    assert (result["splits"]["train"]["used"], result["splits"]["train"]["rejected"]) == (2, 1)
    assert main(arguments) == 1
    assert "rows.jsonl:2" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    text, result = run(["doctor"], capsys)
    assert "torch" in text
    assert "problems" in result


def test_a_damaged_adapter_is_one_message(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = place / "damaged"
    shutil.copytree(place / "run", damaged)
    with (damaged / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert main(["generate", "--adapter", str(damaged), "--prompt", "x", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "adapter_model.safetensors" in captured.err
    assert "Traceback" not in captured.err
