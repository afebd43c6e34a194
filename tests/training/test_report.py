"""What a run tells while it trains: TensorBoard gets every step."""

from itertools import product
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafleet.config.training import RunConfig
from lorafleet.errors import Interrupted, MissingExtraError
from lorafleet.training import report
from lorafleet.training.events import Evaluated
from lorafleet.training.run import train
from tests.tiny import tiny_base_folder


def test_tensorboard_gets_every_step_and_evaluation(tmp_path: Path) -> None:
    knobs = {"max_steps": 3, "max_rows": 12, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    output = tmp_path / "run"
    train(
        model=str(tiny_base_folder(tmp_path / "base", "llama")),
        data="sample:movie_polarity",
        output_dir=str(output),
        report_to=["tensorboard"],
        **knobs,
    )
    events = EventAccumulator(str(output / "tensorboard" / "adapter"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 3]


def test_tensorboard_has_every_adapter_as_a_run_of_its_own_though_it_was_stopped(tmp_path: Path) -> None:
    run = RunConfig(output_dir="runs/x", report_to=["tensorboard"])
    stopped = pytest.raises(Interrupted, match=r"stopped at step 4.*go on with: .* --output-dir runs/x")
    with stopped, report.reporting(tmp_path, run, 0, report.ProgressReport(1)) as (_, observers):
        for name, loss in (("trial 0 seed 42", 2.0), ("trial 1 seed 42", 3.0)):
            for step, observe in product(range(1, 5), observers):
                observe(Evaluated(name, step, loss, True))
        raise Interrupted("stopped at step 4")
    for name, loss in (("trial 0 seed 42", 2.0), ("trial 1 seed 42", 3.0)):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name))
        events.Reload()
        assert [event.value for event in events.Scalars("eval/loss")] == [loss] * 4


def test_a_missing_tracker_is_named_before_anything_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"report_to tensorboard.*lorafleet\[tensorboard\]"):
        train(model="nowhere", data="nowhere", output_dir=str(tmp_path / "run"), report_to=["tensorboard"])
    assert not (tmp_path / "run").exists()
