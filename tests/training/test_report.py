"""What a run tells while it trains: TensorBoard gets every step."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafleet.errors import MissingExtraError
from lorafleet.training import report
from lorafleet.training.events import Evaluated, Finished
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


def test_tensorboard_shows_every_adapter_as_a_run_of_its_own(tmp_path: Path) -> None:
    observe = report.tensorboard_observer(tmp_path)
    for name, loss in (("trial 0 seed 42", 2.0), ("trial 1 seed 42", 3.0)):
        observe(Evaluated(name, 4, loss, True))
        observe(Finished(name, 4, "all steps done"))
    for name, loss in (("trial 0 seed 42", 2.0), ("trial 1 seed 42", 3.0)):
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        assert [event.value for event in events.Scalars("eval/loss")] == [loss]


def test_a_missing_tracker_is_named_before_anything_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"report_to tensorboard.*lorafleet\[tensorboard\]"):
        train(model="nowhere", data="nowhere", output_dir=str(tmp_path / "run"), report_to=["tensorboard"])
    assert not (tmp_path / "run").exists()
