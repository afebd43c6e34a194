"""A gate lets through what reaches its limits and beats its rivals by more than chance."""

import math
from typing import Any

import pytest

from lorafleet.config.fleet import GateConfig
from lorafleet.fleets.gates import Evidence, failures

RIGHT = {"base": [False] * 30 + [True] * 10, "own": [False] * 10 + [True] * 30, "shared": [False] * 11 + [True] * 29}


def evidence(**changes: Any) -> Evidence:
    rows = {
        who: {"label_right": right, "loss_sum": [2.0 - one for one in right], "loss_tokens": [1] * 40}
        for who, right in RIGHT.items()
    }
    scores = {who: {"accuracy": sum(right) / 40, "loss": 2 - sum(right) / 40} for who, right in RIGHT.items()}
    return Evidence(**({"scores": scores, "rows": rows, "megabytes": 9.8} | changes))


@pytest.mark.parametrize(
    "gate",
    [
        {},
        {"at_least": {"accuracy": 0.75}, "at_most": {"loss": 1.25}},
        {"better_than": ["base"], "not_worse_than": ["base", "shared", "prod"]},
        {"better_than": ["base", "prod"], "metric": "loss"},  # there is no prod to beat yet
        {"max_megabytes": 10, "deployable": ["peft", "vllm"]},
        {"max_forgetting": 0.1},
    ],
)
def test_passes(gate: dict[str, Any]) -> None:
    assert failures(GateConfig(**gate), evidence(forgetting=0.05)) == []


@pytest.mark.parametrize(
    ("gate", "changes", "reason"),
    [
        ({"at_least": {"accuracy": 0.8}}, {}, "accuracy 75.0% is below 80.0%"),
        ({"at_most": {"loss": 1.2}}, {}, "loss 1.2500 is above 1.2000"),
        ({"at_least": {"macro_f1": 0.5}}, {}, "macro F1 (not measured) is below 50.0%"),
        ({"better_than": ["shared"]}, {}, "not better than shared: accuracy 75.0% against 72.5% by more than chance"),
        ({"max_megabytes": 5}, {}, "9.8 MB is above 5 MB"),
        ({"max_forgetting": 0.1}, {"forgetting": 0.2}, "the loss on a general text rises by 0.200, above 0.1"),
        ({"deployable": ["vllm"]}, {"reasons_against": {"vllm": ["it is DoRA"]}}, "vllm cannot serve it: it is DoRA"),
    ],
)
def test_fails_with_the_reason(gate: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    assert failures(GateConfig(**gate), evidence(**changes)) == [reason]


def test_whoever_is_worse_by_more_than_chance_fails_by_default() -> None:
    given = evidence()
    turned = {"scores": {**given.scores, "own": given.scores["base"], "base": given.scores["own"]}}
    turned["rows"] = {**given.rows, "own": given.rows["base"], "base": given.rows["own"]}
    for metric, figures in (("accuracy", "accuracy 25.0% against 75.0%"), ("loss", "loss 1.7500 against 1.2500")):
        assert failures(GateConfig(metric=metric), evidence(**turned)) == [f"worse than base: {figures}"]


def test_all_reasons_are_told() -> None:
    gate = GateConfig(at_least={"accuracy": 0.99}, better_than=["shared"], max_megabytes=1)
    assert len(failures(gate, evidence())) == 3


def test_a_stricter_level_lets_less_through() -> None:
    rows = {"own": {"label_right": [True] * 3 + [False] * 11}, "base": {"label_right": [False] * 14}}
    given = evidence(rows=rows)  # of 14 draws none is one of the three in (11 / 14)¹⁴ = 3.4 % of all cases
    assert failures(GateConfig(better_than=["base"], significance=0.2), given) == []
    assert failures(GateConfig(better_than=["base"], significance=0.05), given) != []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "gate",
    [
        {"not_worse_than": []},
        {"at_most": {"loss": 1.5}, "not_worse_than": []},
        {"better_than": ["base"], "metric": "loss"},
        {"not_worse_than": ["base"], "metric": "loss"},
    ],
)
def test_a_loss_that_is_no_number_passes_nothing(gate: dict[str, Any], value: float) -> None:
    given = evidence()
    scores = {**given.scores, "own": given.scores["own"] | {"loss": value}}
    rows = {**given.rows, "own": given.rows["own"] | {"loss_sum": [value] * 40}}
    assert failures(GateConfig(**gate), evidence(scores=scores, rows=rows))[0] == f"loss is no number ({value})"


def test_a_rival_whose_loss_is_no_number_is_not_beaten() -> None:
    given = evidence()
    scores = {**given.scores, "base": given.scores["base"] | {"loss": math.nan}}
    for rival in ("better_than", "not_worse_than"):
        gate = GateConfig(**{"not_worse_than": [], rival: ["base"], "metric": "loss"})
        assert failures(gate, evidence(scores=scores)) == ["no difference to base: loss 1.2500 against nan"]


def test_forgetting_that_is_no_number_is_too_much() -> None:
    found = failures(GateConfig(max_forgetting=0.1), evidence(forgetting=math.nan))
    assert found == ["the loss on a general text rises by nan, above 0.1"]


def test_a_rival_that_could_not_be_asked_is_not_passed_over() -> None:
    unmet = {"prod": "it is damaged"}
    for rival in ("better_than", "not_worse_than"):
        gate = GateConfig(**{"not_worse_than": [], rival: ["prod"]})
        remedy = "take prod out of the gate to be judged without it"
        assert failures(gate, evidence(unmet=unmet)) == [f"not compared with prod: it is damaged; {remedy}"]
    assert failures(GateConfig(), evidence(unmet=unmet)) == [], "this gate does not name it"
