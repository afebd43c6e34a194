"""What is printed of estimates, evidence and advice follows from what was measured."""

from typing import Any

import pytest
from rich.console import Console

from benchmarks import advise, estimate, evidence
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import TrainingConfig


def shown(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cell(memory: list[float], seconds: list[float], parameters: list[int], others: float = 0.0) -> dict[str, Any]:
    return {"parameters": parameters, "memory": memory, "seconds": seconds, "others": others}


def test_errors_of_estimates() -> None:
    cells = [cell([90, 100], [1, 2], [5, 5]), cell([120, 100], [2, 2], [5, 5]), cell([100, 100], [3, 2], [5, 5])]
    report = {"cells": cells}
    assert estimate.errors(report, "memory") == pytest.approx([0.1, 0.2, 0.0])
    assert estimate.summary(report) == [
        "parameters: all exact",
        "peak memory: off by 10.0% (median), 20.0% (worst)",
        "time: off by 50.0% (median), 50.0% (worst)",
    ]
    cells.append(cell([1, 1], [1, 1], [5, 6], others=0.5))
    lines = estimate.summary(report)
    assert lines[0] == "parameters: 1 wrong" and "not to be quoted: other programs used up to 0.5 cores" in lines[-1]


NAMES = list(evidence.settings())


def test_evidence_is_the_difference_from_the_centre() -> None:
    losses: list[list[float | None]] = [[1.0, 1.1], *([[0.9, 1.0]] * (len(NAMES) - 1))]
    losses[2] = [None]
    text = shown(evidence.table({"names": NAMES, "sets": {"rows": {"losses": losses}}}))
    assert "1.0500" in text and "-0.1000" in text and "+inf" in text and "0.1000" in text


def test_every_setting_of_the_evidence_is_one_that_trains() -> None:
    _, *moved = evidence.settings().values()
    for one in moved:
        load_sections((LoraConfig, TrainingConfig), one, {})
        assert sum(one[knob] != evidence.CENTRE[knob] for knob in one) == 1


@pytest.mark.parametrize(
    ("advised", "word"), [([0.5, 0.52], "better"), ([0.99, 1.0], "no different"), ([1.4, 1.5], "worse")]
)
def test_advice_is_judged_by_the_spread_of_seeds(advised: list[float], word: str) -> None:
    one = {"settings": {"rows": 8, "seeds": 2}, "losses": {"defaults": [1.0, 1.02], "advice": advised}}
    report = {"sets": {"rows": one}}
    assert word in shown(advise._table(report))
