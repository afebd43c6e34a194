"""A run that is killed anywhere and resumed ends with the same bytes as one that was not."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lorafleet.errors import CheckpointError, Interrupted, LorafleetError, TrainingError
from lorafleet.training.run import train
from tests.tiny import tiny_base_folder

WORDS = "the quick brown fox jumps over lazy dogs while seven wizards box".split()


def make_place(folder: Path) -> Path:
    """A tiny base and rows for it."""
    tiny_base_folder(folder / "base", "llama")
    rng = random.Random(3)
    rows = [
        {"prompt": " ".join(rng.choices(WORDS, k=4)), "completion": " ".join(rng.choices(WORDS, k=3))}
        for _ in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("resume"))


def settings(place: Path, output: str, **knobs: Any) -> dict[str, Any]:
    return {
        "model": str(place / "base"),
        "data": str(place / "rows.jsonl"),
        "output_dir": str(place / output),
        "valid_fraction": 0.2,
        "max_steps": 40,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.2,
        "target_modules": "q_proj, down_proj, lm_head, embed_tokens",
        "r": 2,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 100,
        "num_threads": 1,
    } | knobs


def outcome(place: Path, output: str) -> dict[str, Any]:
    """The bytes and columns that must not depend on interruptions."""
    folder = place / output
    timeless = [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    state = load_file(folder / "checkpoint-40" / "state.safetensors")
    return {
        "adapter": (folder / "adapter_model.safetensors").read_bytes(),
        "optimizer": {name: tensor.tobytes() for name, tensor in state.items()},
        "losses": timeless,
    }


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    """A run that nothing disturbed."""
    result = train(settings(place, "whole"))
    assert result.steps == 40 and result.eval_loss is not None and result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    return outcome(place, "whole")


def test_a_second_run_gives_the_same_bytes(place: Path, whole: dict[str, Any]) -> None:
    train(settings(place, "again"))
    assert outcome(place, "again") == whole


def test_a_stop_signal_saves_a_checkpoint_and_resuming_gives_the_same_bytes(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after_5(event: Any) -> None:
        if getattr(event, "step", 0) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    class Killer:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, event: Any) -> None:
            stop_after_5(event)

        def close(self) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr("lorafleet.training.run.ProgressReport", Killer)
        with pytest.raises(Interrupted, match="stopped at step 5.*--resume-from-checkpoint"):
            train(settings(place, "stopped"))
    assert (place / "stopped" / "checkpoint-5").is_dir()
    train(settings(place, "stopped", resume_from_checkpoint=True))
    assert outcome(place, "stopped") == whole


def test_another_run_is_refused_by_name(place: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="holds another run"):
        train(settings(place, "whole"))
    before = {path.name: path.read_bytes() for path in (place / "whole").iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"training\.learning_rate: 0\.01 then, 0\.02 now"):
        train(settings(place, "whole", resume_from_checkpoint=True, learning_rate=0.02))
    rows = (place / "rows.jsonl").read_text()
    (place / "other.jsonl").write_text(rows.replace("fox", "cat"))
    with pytest.raises(CheckpointError, match="data: "):
        train(settings(place, "whole", resume_from_checkpoint=True, data=str(place / "other.jsonl")))
    assert {path.name: path.read_bytes() for path in (place / "whole").iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"data": "TEST_ONLY"}, "no rows to train on, only test"),
        ({"target_modules": ["q_porj"]}, "q_porj"),
        ({"modules_to_save": ["lm_haed"]}, "lm_haed"),
    ],
)
def test_overwriting_starts_when_everything_is_checked(
    place: Path, whole: dict[str, Any], knobs: dict[str, Any], message: str
) -> None:
    (place / "test-only").mkdir(exist_ok=True)
    (place / "test-only" / "test.jsonl").write_text((place / "rows.jsonl").read_text())
    if knobs.get("data") == "TEST_ONLY":
        knobs = {"data": str(place / "test-only")}
    with pytest.raises(LorafleetError, match=message):
        train(settings(place, "whole", overwrite=True, **knobs))
    assert outcome(place, "whole") == whole


def test_overwriting_replaces_the_run_and_is_no_setting_of_it(place: Path) -> None:
    train(settings(place, "twice", max_steps=4))
    train(settings(place, "twice", max_steps=2, overwrite=True))
    assert [path.name for path in (place / "twice").glob("checkpoint-*")] == ["checkpoint-2"]
    result = train(str(place / "twice" / "lorafleet.yaml"), resume_from_checkpoint=True)
    assert result.steps == 2


def test_the_last_adapter_is_kept_where_the_best_is_not_wanted(place: Path) -> None:
    knobs = {"max_steps": 9, "learning_rate": 3.0, "warmup_ratio": 0, "eval_steps": 1, "save_strategy": "no"}
    best = train(settings(place, "best", **knobs))
    last = train(settings(place, "last", load_best_model_at_end=False, **knobs))
    assert best.best_step < 9 and "| kept from step | 9 |" not in (place / "best" / "README.md").read_text()
    assert last.best_step == 9 and "| kept from step | 9 |" in (place / "last" / "README.md").read_text()


def test_nan_names_the_rows_and_keeps_the_last_good_state(place: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)stopped in step \d+.*rows\.jsonl:\d+.*checkpoint-\d+"):
        train(settings(place, "nan", learning_rate=1e30, max_grad_norm=0, warmup_ratio=0, save_strategy="no"))


def _child(knobs: dict[str, Any]) -> None:
    train(knobs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments(place: Path, whole: dict[str, Any]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorafleet.training.run"])
    rng, kills, number = random.Random(11), 0, 0
    while kills < 20:
        number += 1
        output = f"killed-{number}"
        while True:
            resume = (place / output / "lorafleet.yaml").exists()
            child = context.Process(target=_child, args=(settings(place, output, resume_from_checkpoint=resume),))
            child.start()
            child.join(rng.uniform(0.5, 6.0))
            if child.exitcode is not None:
                assert child.exitcode == 0
                break
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            kills += 1
            time.sleep(0.05)
        assert outcome(place, output) == whole, f"after {kills} kills"
