"""What a search space may say, and what is wrong with it."""

import re
from typing import Any

import pytest

from lorafleet.config.lora import LoraConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.errors import ConfigError
from lorafleet.search.presets import PRESETS
from lorafleet.search.space import combinations, in_words, parse_space
from lorafleet.search.study import plan_trials

BASE = (LoraConfig(), TrainingConfig())


def settings_of(given: Any) -> list[dict[str, Any]]:
    space = parse_space(given, BASE)
    return [space.settings(chosen) for chosen in combinations(space)]


def test_lists_make_a_grid() -> None:
    assert settings_of({"r": [4, 8], "alpha": [16, 32]}) == [
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 32},
        {"r": 8, "lora_alpha": 16},
        {"r": 8, "lora_alpha": 32},
    ]


def test_a_range_has_both_ends() -> None:
    assert [s["r"] for s in settings_of({"r": {"range": [4, 16], "step": 4}})] == [4, 8, 12, 16]
    assert [s["warmup_steps"] for s in settings_of({"warmup-steps": {"range": [0, 3]}})] == [0, 1, 2, 3]
    assert [s["lora_dropout"] for s in settings_of({"dropout": {"range": [0, 0.3], "step": 0.1}})] == [0, 0.1, 0.2, 0.3]


def test_linked_values_go_together() -> None:
    linked = [[{"r": 8, "alpha": 16}, {"r": 16, "lora_alpha": 32}]]
    assert settings_of({"linked": linked}) == [{"r": 8, "lora_alpha": 16}, {"r": 16, "lora_alpha": 32}]


def test_a_condition_leaves_a_knob_to_the_run_elsewhere() -> None:
    given = {"r": [4, 8], "lora_dropout": {"values": [0.1, 0.2], "when": {"r": [8]}}}
    assert settings_of(given) == [{"r": 4}, {"r": 8, "lora_dropout": 0.1}, {"r": 8, "lora_dropout": 0.2}]


def test_lists_and_mappings_are_values_too() -> None:
    given = {"target_modules": [["q_proj", "v_proj"], "all-linear"], "rank_pattern": [{}, {"q_proj": 16}]}
    assert len(settings_of(given)) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_space(name: str) -> None:
    assert parse_space(name, BASE).dimensions


def test_presets_are_what_guides_show() -> None:
    assert parse_space("classic", BASE).size == 16
    assert parse_space("wide", BASE).size == 160
    assert parse_space("recommended", BASE).knobs == ["learning_rate", "r", "lora_alpha"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clasic", "space = 'clasic' is no preset; did you mean 'classic'?"),
        ({}, "space is empty"),
        ({"r": []}, "r has an empty list"),
        ({"r": 8}, "r = 8 is one value; give a list to search, or set it outside of space"),
        ({"r": [8, 8]}, "r names a value twice"),
        ({"rnk": [8]}, "unknown knob 'rnk'; did you mean"),
        ({"seed": [1, 2]}, "seed cannot be searched: every trial has the same seed"),
        ({"max_steps": [1, 2]}, "max_steps cannot be searched: all trials have the same budget"),
        ({"lr": {"log": [1e-3, 1e-5]}}, "learning_rate: log is two numbers, the smaller first, both above 0"),
        ({"lr": {"log": [0, 1e-5]}}, "both above 0; got [0, 1e-05]"),
        ({"lr": {"log": [1e-5, 1e-3], "step": 2}}, "step = 2 is for range"),
        ({"lr": {"rnge": [1e-5, 1e-3]}}, "unknown key 'rnge'"),
        ({"r": {"range": [1.5, 4]}}, "r is a whole number"),
        ({"r": [0]}, "r = 0: should be greater than or equal to 1"),
        ({"lora_dropout": [0.1, 1.5]}, "lora_dropout = 1.5: should be less than 1"),
        ({"r": [4, 8], "linked": [[{"r": 4}]]}, "r is searched twice"),
        ({"linked": [[{"r": 4}, {"lora_alpha": 4}]]}, "names other knobs in one mapping than in another"),
        ({"linked": [{"r": 4}]}, "linked is a list of sets"),
        ({"r": {"values": [4], "when": {"bias": ["all"]}}}, "when names bias, which is not searched before it"),
        ({"bias": ["none"], "r": {"values": [4], "when": {"bias": "all"}}}, "bias is never all, so it is never tried"),
    ],
)
def test_what_is_wrong_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_space(given, BASE)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError, match="the search space is wrong: 3 faults") as caught:
        parse_space({"rnk": [8], "r": [], "learning_rate": [-1.0]}, BASE)
    assert str(caught.value).count("\n  - ") == 3


def test_who_chooses_follows_from_the_space() -> None:
    grid, span = parse_space("classic", BASE), parse_space({"lr": {"log": [1e-5, 1e-3]}}, BASE)
    assert (plan_trials(SearchConfig(), grid)[0], len(plan_trials(SearchConfig(), grid)[1])) == ("grid", 16)
    assert (plan_trials(SearchConfig(n_trials=5), grid)[0], len(plan_trials(SearchConfig(n_trials=5), grid)[1])) == (
        "tpe",
        5,
    )
    assert (plan_trials(SearchConfig(), span)[0], len(plan_trials(SearchConfig(), span)[1])) == ("tpe", 20)
    assert len(plan_trials(SearchConfig(sampler="grid", n_trials=5), grid)[1]) == 5
    with pytest.raises(ConfigError, match="sampler = grid, but learning_rate has any number of values"):
        plan_trials(SearchConfig(sampler="grid"), span)


def test_settings_in_words() -> None:
    assert in_words({"r": 8, "learning_rate": 0.00012345, "bias": "none"}) == "r 8, learning_rate 0.000123, bias none"


def test_a_space_on_the_command_line_is_yaml() -> None:
    assert SearchConfig(space="{r: [4, 8]}").space == {"r": [4, 8]}
    assert SearchConfig(objective=["loss"]).objectives == ["loss"]
    with pytest.raises(ValueError, match="names each objective once"):
        SearchConfig(objective=["loss", "loss"])
