"""A whole search on a tiny base: what it finds, what it refuses, and what an interruption does to it."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file

from lorafleet.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from lorafleet.files.adapter import load_adapter
from lorafleet.files.checkpoint import load_checkpoint, newest_checkpoint
from lorafleet.search.live import LiveTable
from lorafleet.search.result import TuneResult
from lorafleet.search.run import tune
from lorafleet.training.run import train
from tests.training.test_resume import make_place

RATES = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("search"))


def settings(place: Path, output: str, **knobs: Any) -> dict[str, Any]:
    return {
        "model": str(place / "base"),
        "data": str(place / "rows.jsonl"),
        "output_dir": str(place / output),
        "space": {"learning_rate": RATES, "r": [1, 4]},
        "valid_fraction": 0.2,
        "max_steps": 18,
        "per_device_train_batch_size": 2,
        "population_size": 3,
        "reduction_factor": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "num_threads": 1,
    } | knobs


def outcome(result: TuneResult) -> dict[str, Any]:
    """What must not depend on interruptions."""
    trials = [{k: v for k, v in trial.items() if k != "seconds"} for trial in result.trials]
    adapter = (Path(result.best) / "adapter_model.safetensors").read_bytes()
    folder = Path(result.output_dir)
    timeless = [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {"trials": trials, "best": result.best_trial, "adapter": adapter, "losses": timeless}


@pytest.fixture(scope="module")
def whole(place: Path) -> TuneResult:
    """A search that nothing disturbed."""
    return tune(settings(place, "whole"))


def test_a_search_ranks_all_trials_and_stops_the_worse_ones(whole: TuneResult) -> None:
    states = [trial["state"] for trial in whole.trials]
    assert len(states) == 10
    assert states.count("pruned") >= 4
    losses = [trial["values"][0] for trial in whole.trials if trial["values"]]
    assert losses == sorted(losses)
    assert whole.best_trial == whole.trials[0]["number"]
    assert losses[0] < whole.before["loss"]
    assert whole.tokens < 0.7 * whole.full_tokens


def test_every_decision_follows_from_those_who_were_there(whole: TuneResult) -> None:
    """The winner was among the best third at each rung of all that ever came there."""
    winner = whole.trials[0]
    for tokens, value in winner["at_rungs"].items():
        arrived = [trial["at_rungs"][tokens] for trial in whole.trials if tokens in trial["at_rungs"]]
        assert sum(other < value for other in arrived) < max(1, len(arrived) // 3)
    stopped = [trial for trial in whole.trials if trial["state"] == "pruned"]
    assert all(trial["at_rungs"] and trial["tokens"] < 18 * 2 * 40 for trial in stopped)


def test_the_winner_can_be_used_and_trained_again(place: Path, whole: TuneResult) -> None:
    adapter = load_adapter(Path(whole.best))
    assert adapter.config.r == whole.best_settings["r"]
    assert [path.name for path in (place / "whole" / "trials").iterdir()] == [f"trial-{whole.best_trial}-seed-42"]
    again = train(str(Path(whole.best) / "lorafleet.yaml"), output_dir=str(place / "again"), eval_strategy="no")
    assert again.eval_loss == pytest.approx(whole.trials[0]["values"][0], rel=1e-5)
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (place / "again", Path(whole.best)))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_record_is_an_optuna_study(place: Path, whole: TuneResult) -> None:
    study = optuna.load_study(study_name="whole", storage=f"sqlite:///{place / 'whole' / 'study.db'}")
    assert study.best_trial.number == whole.best_trial
    assert study.best_value == whole.trials[0]["values"][0]


def test_a_second_search_gives_the_same_bytes(place: Path, whole: TuneResult) -> None:
    assert outcome(tune(settings(place, "second"))) == outcome(whole)


def test_a_stopped_search_goes_on_where_it_was(place: Path, whole: TuneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [0]
    call = LiveTable.__call__

    def stopping(self: LiveTable, event: Any) -> None:
        seen[0] += 1
        if seen[0] == 40:
            os.kill(os.getpid(), signal.SIGINT)
        call(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(LiveTable, "__call__", stopping)
        with pytest.raises(Interrupted, match="--resume-from-checkpoint"):
            tune(settings(place, "stopped"))
    assert outcome(tune(settings(place, "stopped", resume_from_checkpoint=True))) == outcome(whole)


def _killed_at(knobs: dict[str, Any], event_number: int) -> None:
    call, seen = LiveTable.__call__, [0]

    def killing(self: LiveTable, event: Any) -> None:
        seen[0] += 1
        if seen[0] == event_number:
            os.kill(os.getpid(), signal.SIGKILL)
        call(self, event)

    LiveTable.__call__ = killing  # type: ignore[method-assign]
    tune(knobs)


def test_a_killed_search_takes_the_same_decisions(place: Path, whole: TuneResult) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorafleet.search.run"])
    for at in (3, 17, 60):  # before the first checkpoint, at a rung, and between checkpoints later on
        resume = (place / "killed" / "lorafleet.yaml").exists()
        knobs = settings(place, "killed", resume_from_checkpoint=resume)
        child = context.Process(target=_killed_at, args=(knobs, at))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert outcome(tune(settings(place, "killed", resume_from_checkpoint=True))) == outcome(whole)


def test_decisions_after_the_last_checkpoint_are_found_again(place: Path, whole: TuneResult) -> None:
    """Without checkpoints all is trained again, beside the reports of trials that had come to the rungs later."""
    context = multiprocessing.get_context("forkserver")
    knobs = settings(place, "decided", save_strategy="no")
    child = context.Process(target=_killed_at, args=(knobs, 100))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert outcome(tune(knobs | {"resume_from_checkpoint": True})) == outcome(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_at_random_moments(place: Path, whole: TuneResult) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorafleet.search.run"])
    rng, kills, number = random.Random(5), 0, 0
    while kills < 10:
        number += 1
        output = f"kills-{number}"
        while True:
            resume = (place / output / "lorafleet.yaml").exists()
            child = context.Process(target=tune, args=(settings(place, output, resume_from_checkpoint=resume),))
            child.start()
            child.join(rng.uniform(1.0, 8.0))
            if child.exitcode is not None:
                assert child.exitcode == 0
                break
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            kills += 1
        again = tune(settings(place, output, resume_from_checkpoint=True))  # a finished search is told again
        assert outcome(again) | {"losses": None} == outcome(whole) | {"losses": None}, f"after {kills} kills"


def test_a_finished_search_can_be_told_again(place: Path, whole: TuneResult) -> None:
    assert outcome(tune(settings(place, "whole", resume_from_checkpoint=True))) == outcome(whole)


def test_another_search_is_refused(place: Path, whole: TuneResult) -> None:
    with pytest.raises(CheckpointError, match="holds another run"):
        tune(settings(place, "whole"))
    with pytest.raises(CheckpointError, match=r"search\.reduction_factor: 3 then, 2 now"):
        tune(settings(place, "whole", resume_from_checkpoint=True, reduction_factor=2))
    url = f"sqlite:///{place / 'whole' / 'study.db'}"
    with pytest.raises(CheckpointError, match="holds another search named 'whole'"):
        tune(settings(place, "elsewhere", storage=url, study_name="whole", max_steps=9))


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"space": {"r": [4, 999]}}, ["r = 999 is more than", "can hold"]),
        ({"space": {"target_modules": ["q_proj", "q_porj"]}}, ["q_porj", "did you mean 'q_proj'"]),
        ({"objective": "accuracy"}, ["objective = accuracy needs text/label rows"]),
        ({"objective": ["los", "macro_f1"]}, ["did you mean 'loss'", "macro_f1 needs text/label rows"]),
        ({"space": {"r": [], "rnk": [1]}}, ["empty list", "unknown knob 'rnk'"]),
        ({"valid_fraction": 0.0}, ["held-out rows to compare by"]),
        (
            {"space": {"r": [999], "target_modules": ["q_porj"]}, "objective": "accuracy"},
            ["q_porj", "accuracy", "r = 999"],
        ),
    ],
)
def test_what_cannot_be_searched_is_told_before_training(place: Path, knobs: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tune(settings(place, "refused", **knobs))
    assert all(part in str(caught.value) for part in parts)
    assert not (place / "refused" / "study.db").exists()


def test_settings_that_mean_the_same_are_trained_once(place: Path) -> None:
    linked = [[{"r": 4, "lora_alpha": 16}, {"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 2, "lora_alpha": 8}]]
    space = {"linked": [[one | {"use_rslora": one.get("use_rslora", False)} for one in linked[0]]]}
    result = tune(settings(place, "same", space=space, pruning=False, max_steps=3))
    by_number = {trial["number"]: trial for trial in result.trials}
    assert by_number[1]["same_as"] == 0
    assert by_number[1]["values"] == by_number[0]["values"]
    assert by_number[1]["tokens"] == 0
    assert by_number[2]["same_as"] is None


def test_a_trial_that_diverges_fails_alone(place: Path) -> None:
    knobs = {"space": {"learning_rate": [1e-3, 1e30]}, "max_grad_norm": 0.0, "warmup_ratio": 0.0}
    result = tune(settings(place, "diverged", **knobs))
    assert [trial["state"] for trial in result.trials] == ["complete", "fail"]
    with pytest.raises(TrainingError, match="none of the 1 trials could be trained to the end"):
        tune(settings(place, "none", **knobs | {"space": {"learning_rate": [1e30]}}))


def test_seeds_repeat_a_setting_and_their_mean_counts(place: Path) -> None:
    result = tune(settings(place, "seeds", space={"learning_rate": [1e-3, 1e-2]}, seeds_per_trial=3, max_steps=6))
    best = result.trials[0]
    losses = {seed: run["loss"] for seed, run in best["runs"].items()}
    assert sorted(losses) == ["42", "43", "44"]
    assert len(set(losses.values())) == 3
    assert best["values"][0] == pytest.approx(sum(losses.values()) / 3)
    kept = json.loads((Path(result.best) / "lorafleet.json").read_text())["metadata"]["metrics"]["loss"]
    assert kept == min(losses.values())


def test_rungs_within_the_warm_up_are_pointed_out(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    tune(settings(place, "warm", space={"r": [1, 2]}, warmup_steps=3, max_steps=10))
    assert "first compared after step 2 of 10" in caplog.text
    assert "warm-up of 3 steps" in caplog.text


def test_several_objectives_are_not_pruned(place: Path) -> None:
    space = {"r": [1, 4], "learning_rate": [1e-3, 1e-2]}
    result = tune(settings(place, "several", objective=["loss", "parameters"], space=space, max_steps=4))
    assert {trial["state"] for trial in result.trials} == {"complete"}
    sizes = {trial["settings"]["r"]: trial["values"][1] for trial in result.trials}
    assert sizes[4] == 4 * sizes[1]
    small, large = (next(t for t in result.trials if t["settings"]["r"] == r) for r in (1, 4))  # the best of each
    assert set(result.front) == {one["number"] for one in (small, large) if one in (small, result.trials[0])}


def test_quality_is_weighed_against_latency(place: Path) -> None:
    result = tune(settings(place, "latency", objective=["loss", "latency"], space={"r": [1, 4]}, max_steps=2))
    assert {trial["state"] for trial in result.trials} == {"complete"}
    assert all(0.5 < trial["values"][1] < 20 for trial in result.trials)
    with pytest.raises(ConfigError, match="name a measure of quality"):
        tune(settings(place, "costs", objective=["latency", "parameters"]))


def test_what_has_ended_is_measured_without_dropout(place: Path) -> None:
    rows = [{"text": f"word {i} of many", "label": ("good", "bad")[i % 2]} for i in range(40)]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    knobs = {"data": str(place / "labels.jsonl"), "objective": "accuracy", "space": {"lora_dropout": [0.5]}}
    result = tune(settings(place, "dropped", **knobs, max_steps=6, learning_rate=1e-2))
    lines = [json.loads(line) for line in (place / "dropped" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if line["event"] == "eval"]
    assert result.trials[0]["metrics"]["loss"] == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.parametrize(
    "sampler", ["tpe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "cmaes", "nsga2"))]
)
def test_samplers_choose_by_number_and_seed(place: Path, sampler: str) -> None:
    space = {"learning_rate": {"log": [1e-4, 1e-1]}, "lora_dropout": {"range": [0, 0.2]}, "r": {"range": [1, 4]}}
    knobs = {"space": space, "sampler": sampler, "n_trials": 6, "max_steps": 4}
    first, second = (tune(settings(place, f"{sampler}-{n}", **knobs)) for n in range(2))
    rates = {trial["settings"]["learning_rate"] for trial in first.trials}
    assert len(rates) == 6 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert first.trials[0]["settings"] == second.trials[0]["settings"]
    assert [t["values"] for t in first.trials] == [t["values"] for t in second.trials]


def test_a_batch_size_in_the_space_keeps_the_budget(place: Path) -> None:
    result = tune(
        settings(place, "batch", space={"per_device_train_batch_size": [1, 2, 6]}, pruning=False, max_steps=12)
    )
    steps = {m["name"]: m["step"] for m in outcome(result)["losses"] if m["event"] == "step"}
    assert sorted(steps.values()) == [4, 12, 24]
    tokens = [trial["tokens"] for trial in result.trials]
    assert max(tokens) < 1.3 * min(tokens)


def test_a_fixed_population_is_estimated_from_memory_when_not_given(place: Path) -> None:
    result = tune(settings(place, "estimated", population_size=None, space={"r": [1, 2, 4]}, max_steps=2))
    assert 1 <= result.population_size <= 3
    assert not math.isnan(result.trials[0]["values"][0])


def test_a_grid_meets_at_its_rungs_though_a_pass_holds_fewer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def in_passes_of_two(*args: Any) -> tuple[int, int]:
        asked.append(args[-2])
        return args[-2], 2

    given = tune(settings(place, "given", population_size=9))
    monkeypatch.setattr("lorafleet.search.worker.measured_capacity", in_passes_of_two)
    found = tune(settings(place, "passes", population_size=None))
    assert asked == [9] and found.population_size == 9
    newest = newest_checkpoint(place / "passes")
    assert newest and load_checkpoint(newest)[1]["extra"]["together"] == 2
    assert [(t["number"], t["state"]) for t in found.trials] == [(t["number"], t["state"]) for t in given.trials]
    assert found.trials[0]["values"] == pytest.approx(given.trials[0]["values"], rel=1e-5)


def test_the_message_of_a_full_storage_names_it(place: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape("cannot open the study")):
        tune(settings(place, "badurl", storage="sqlite:////nonexistent/folder/study.db"))
