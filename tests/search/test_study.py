"""The record of a search: every trial is taken once, and none is lost."""

from pathlib import Path
from typing import Any

import pytest

from lorafleet.config.lora import LoraConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.search.result import places, ranking
from lorafleet.search.space import parse_space
from lorafleet.search.study import Study


def open_study(folder: Path, owner: str, given: Any = None) -> Study:
    space = parse_space(given or {"r": [1, 2, 4]}, (LoraConfig(), TrainingConfig()))
    return Study(SearchConfig(), space, f"sqlite:///{folder / 'study.db'}", "one", 7, {"data": "x"}, owner)


def test_two_owners_take_every_trial_once(tmp_path: Path) -> None:
    first, second = open_study(tmp_path, "first"), open_study(tmp_path, "second")
    taken = [study.ask() for study in (first, second, first, second)]
    assert taken == [(0, {"r": 1}), (1, {"r": 2}), (2, {"r": 4}), None]
    assert [record.notes["owner"] for record in first.records] == ["first", "second", "first"]


def test_a_trial_whose_taker_died_at_once_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = open_study(tmp_path, "first"), open_study(tmp_path, "second")
    with monkeypatch.context() as patch:
        patch.setattr(first, "_id", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.ask()
    assert first.record(0).state == "running"
    assert second.ask() == (0, {"r": 1})
    assert second.ask() == (1, {"r": 2})


def test_a_knob_by_which_trials_were_stopped_matters_most(tmp_path: Path) -> None:
    study = open_study(tmp_path, "one", {"r": [1, 2, 4, 8], "lora_alpha": [1, 2, 4, 8]})
    while taken := study.ask():
        number, chosen = taken
        loss = 2 - chosen["lora_alpha"] / 10 + chosen["r"] / 1000
        study.report(number, 100, loss)
        if chosen["lora_alpha"] == 8:
            study.complete(number, [loss - 0.5])
        else:
            study.prune(number)
    shares = study.importances(places(ranking(study.records, "loss"), "loss"))
    assert shares["lora_alpha"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_nothing_matters_where_all_trials_are_equal(tmp_path: Path) -> None:
    study = open_study(tmp_path, "one", {"r": [1, 2, 4, 8]})
    while taken := study.ask():
        study.complete(taken[0], [1.0])
    assert study.importances(places(ranking(study.records, "loss"), "loss")) == {}
