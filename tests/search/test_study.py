"""The record of a search: every trial is taken once, and none is lost."""

from pathlib import Path
from typing import Any

import pytest

from lorafleet.config.lora import LoraConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import TrainingConfig
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
