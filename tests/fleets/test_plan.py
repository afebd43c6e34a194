"""A fleet's file: what is right is read, what is wrong is told at once, with its place."""

from pathlib import Path
from typing import Any

import pytest

from lorafleet.errors import ConfigError
from lorafleet.fleets.plan import read_plan

TOP = {"model": "tiny", "output_dir": "out"}


def test_tasks_are_their_own_knobs_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yml"
    file.write_text(
        "model: tiny\noutput_dir: out\ndefaults: {r: 4, lr: 1e-3}\ngate: {at_least: {accuracy: 0.6}}\n"
        "tasks:\n  a: {data: a.jsonl}\n  b: {data: b.jsonl, rank: 16, gate: {at_most: {loss: 1.5}}}\n"
    )
    plan = read_plan(file, {"output_dir": "elsewhere"})
    a, b = plan.tasks
    assert (a.name, a.data.data, a.lora.r, a.training.learning_rate) == ("a", "a.jsonl", 4, 1e-3)
    assert (b.lora.r, b.gate.at_least, b.gate.at_most) == (16, {"accuracy": 0.6}, {"loss": 1.5})
    assert a.gate.at_most == {}
    assert plan.run.save_strategy == "steps"
    assert read_plan(file, {"save_strategy": "epoch"}).run.save_strategy == "epoch"
    assert (plan.run.output_dir, plan.users, plan.source["output_dir"]) == ("elsewhere", None, "elsewhere")


def test_users(tmp_path: Path) -> None:
    plan = read_plan(TOP | {"defaults": {"r": 4}, "users": {"data": "ratings", "key": "who", "min_rows": 5}}, {})
    assert plan.users is not None and plan.user_knobs is not None
    assert (plan.users.key, plan.users.min_rows, plan.user_knobs.lora.r) == ("who", 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "a fleet needs tasks: .* or users:"),
        ({"tasks": ["a"]}, r"tasks should be a mapping, not \['a'\]"),
        ({"tasks": {"a": 3}}, "tasks.a should be a mapping, not 3"),
        ({"tasks": {"../a": {"data": "x"}}}, "name '../a' should begin with a letter"),
        ({"tasks": {"a": {"data": "x", "rnak": 3}}}, "a: unknown key 'rnak'; did you mean 'rank'?"),
        ({"tasks": {"a": {"data": "x", "r": 0}}}, "a: r = 0"),
        ({"tasks": {"a": {}}}, "a: data or dataset is required"),
        ({"tasks": {"a": {"data": "x", "gate": {"at_leest": {}}}}}, "a.gate: unknown key 'at_leest'; did you mean"),
        ({"tasks": {"a": {"data": "x"}}, "gate": {"at_least": {"acuracy": 1}}}, "a.gate: at_least"),
        ({"tasks": {"a": {"data": "x"}}, "r": 4}, "r belongs to an adapter: put it under defaults"),
        ({"tasks": {"a": {"data": "x"}}, "alias": "a/b"}, "alias 'a/b' should begin"),
        ({"users": {"data": "x", "kye": "u"}}, "users: unknown key 'kye'; did you mean 'key'?"),
        ({"users": {"key": "u"}}, "users: data is required"),
        ({"tasks": {"a": {"data": "x"}}, "nonsense": 1}, "unknown key 'nonsense'"),
    ],
)
def test_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan(TOP | change, {})


def test_all_faults_at_once(tmp_path: Path) -> None:
    broken = {"tasks": {"a": {"data": "x", "r": 0}, "b/c": {"data": "x", "lr": -1}}, "alias": "@", "model": "tiny"}
    with pytest.raises(ConfigError, match=r"(?s)5 faults.*output_dir.*alias '@'.*a: r = 0.*'b/c'.*b/c: lr = -1"):
        read_plan(broken, {})


def test_a_name_twice_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yml"
    file.write_text("model: tiny\noutput_dir: out\ntasks:\n  a: {data: x}\n  a: {data: y}\n")
    with pytest.raises(ConfigError, match="line 5.*'a' is already on line 4"):
        read_plan(file, {})


def test_names_twice_are_told_with_what_else_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yml"
    file.write_text(
        "model: tiny\noutput_dir: out\ntasks:\n  a: {data: x, r: 0}\n  b/c: {data: x}\n  b/c: {}\n  a: {r: -1}\n"
    )
    twice = "line 6, column 3: key 'b/c' is already on line 5.*line 7, column 3: key 'a' is already on line 4"
    with pytest.raises(ConfigError, match=rf"(?s)6 faults.*{twice}.*a: .*r = -1.*'b/c' should begin"):
        read_plan(file, {})
