"""What no fleet can do is told before anything trains, all of it at once."""

from pathlib import Path
from typing import Any

import pytest

from lorafleet.errors import CheckpointError, ConfigError, DataError
from lorafleet.fleets.run import fleet
from lorafleet.registry.registry import Registry
from tests.fleets.given import KNOBS, by_name, settings, tasks, user_rows, write


@pytest.fixture
def _nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("lorafleet.fleets.run.train_members", refuse)


@pytest.mark.usefixtures("_nothing_trains")
@pytest.mark.parametrize("gate", [{"metric": "accuracy"}, {"at_least": {"macro_f1": 0.5}}])
def test_a_gate_by_labels_needs_labels(place: Path, gate: dict[str, Any]) -> None:
    two = {name: tasks(place)[name] for name in ("moods", "chat")}
    with pytest.raises(
        ConfigError,
        match="chat: the gate asks for accuracy or macro_f1, which rows without labels have not; ask for loss",
    ) as error:
        fleet(settings(place, "by-labels", tasks=two, gate=gate))
    assert "moods" not in str(error.value)


def test_an_adapter_of_a_mixture_is_judged_by_its_loss(place: Path) -> None:
    moods = tasks(place)["moods"]
    knobs = {"tasks": {"a": moods, "b": moods | {"seed": 3}}, "shared": "plain"}
    knobs["gate"] = {"metric": "accuracy", "at_least": {"accuracy": 0.0}}
    found = by_name(fleet(settings(place, "mixed-labels", **knobs)))
    assert (found["shared"].metric, found["a"].metric) == ("loss", "accuracy")
    assert not any("accuracy" in reason for reason in found["shared"].reasons)


@pytest.mark.usefixtures("_nothing_trains")
def test_a_module_is_saved_whole_or_adapted(place: Path) -> None:
    whole = tasks(place)["moods"] | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapts = tasks(place)["chat"] | {"target_modules": ["q_proj", "lm_head"]}
    large = tasks(place)["moods"] | {"r": 500}
    knobs = settings(
        place, "saved", tasks={"small": tasks(place)["moods"], "whole": whole, "adapts": adapts, "l": large}
    )
    with pytest.raises(ConfigError) as error:
        fleet(knobs)
    assert "2 faults" in str(error.value) and "r = 500 is more than" in str(error.value)
    assert "lm_head is in modules_to_save of whole and among the target_modules of adapts" in str(error.value)
    knobs["tasks"] = {"a": whole | {"modules_to_save": ["lm_haed"]}}
    with pytest.raises(ConfigError, match="modules_to_save: 'lm_haed' matches no module; did you mean 'lm_head'"):
        fleet(knobs)


@pytest.mark.usefixtures("_nothing_trains")
def test_the_shared_adapter_stands_beside_the_tasks(place: Path) -> None:
    whole = tasks(place)["moods"] | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    defaults = KNOBS | {"target_modules": ["q_proj", "lm_head"]}
    knobs = settings(place, "saved-shared", tasks={"a": whole, "b": whole}, shared="plain", defaults=defaults)
    with pytest.raises(ConfigError, match="lm_head is in modules_to_save of a and among the target_modules of shared"):
        fleet(knobs)


@pytest.mark.usefixtures("_nothing_trains")
@pytest.mark.parametrize("rival", ["better_than", "not_worse_than"])
def test_a_gate_names_a_shared_adapter_that_is_trained(place: Path, rival: str) -> None:
    gate, users = {rival: ["shared"]}, {"data": str(place / "users.jsonl")}
    one = {"moods": tasks(place)["moods"]}
    with pytest.raises(ConfigError, match="moods: the gate names shared, which is not trained; set shared: plain"):
        fleet(settings(place, "unasked", tasks=one, gate=gate))
    for shared in ("none", "keyed"):
        with pytest.raises(ConfigError, match="users: the gate names shared, which is not trained"):
            fleet(settings(place, "unasked", users=users, gate=gate, shared=shared))
    with pytest.raises(ConfigError, match="moods: the gate names shared, which learns the users' rows"):
        fleet(settings(place, "unasked", users=users, tasks=one, gate=gate))


@pytest.mark.usefixtures("_nothing_trains")
def test_rows_are_not_deleted_before_they_are_read(place: Path) -> None:
    source = place / "within" / "rows" / "ratings.jsonl"
    source.parent.mkdir(parents=True)
    write(source, user_rows({"ann": "good", "bob": "bad"}))
    before = source.read_bytes()
    knobs = settings(place, "within", users={"data": str(source)})
    with pytest.raises(ConfigError, match=r"ratings.jsonl' lies in .*rows, which a fleet of users makes anew"):
        fleet(knobs)
    with pytest.raises(CheckpointError, match="rows is where the users' rows go, and was not made by a fleet"):
        fleet(knobs | {"users": {"data": str(place / "users.jsonl")}})
    assert source.read_bytes() == before


@pytest.mark.usefixtures("_nothing_trains")
@pytest.mark.parametrize("shared", ["keyed", "both"])
def test_a_key_needs_a_prompt(place: Path, shared: str) -> None:
    write(place / "lines.jsonl", [{"user": user, "text": f"{user} {i}"} for user in ("ann", "bob") for i in range(6)])
    users = {"data": str(place / "lines.jsonl")}
    with pytest.raises(ConfigError, match=f"shared = {shared}: plain text has no prompt .*; take plain or none"):
        fleet(settings(place, "lines", users=users, shared=shared))


def test_plain_text_has_one_shared_adapter(place: Path) -> None:
    write(place / "lines.jsonl", [{"user": user, "text": f"{user} {i}"} for user in ("ann", "bob") for i in range(6)])
    users = {"data": str(place / "lines.jsonl")}
    found = by_name(fleet(settings(place, "text-lines", users=users, gate={"not_worse_than": []})))
    assert {name: one.status for name, one in found.items()} == {
        "shared": "passed",
        "ann": "passed",
        "bob": "passed",
        "shared keyed": "left out",
    }


@pytest.mark.usefixtures("_nothing_trains")
def test_a_warm_start_needs_the_shared_adapter(place: Path) -> None:
    good = user_rows({"bob": "bad"}, 3)
    (place / "cold").mkdir()
    write(place / "cold" / "train.jsonl", [{"user": "ann", "text": "no label"}, *user_rows({"ann": "good"}, 2), *good])
    write(place / "cold" / "test.jsonl", user_rows({"ann": "good", "bob": "bad"}, 1))
    # Of everybody's rows the first is ann's, which cannot be used.
    knobs = {"shared": "plain", "warm_start": True, "defaults": KNOBS | {"max_rows": 1, "on_bad_rows": "skip"}}
    with pytest.raises(DataError, match="warm_start needs the shared adapter, which is left out: "):
        fleet(settings(place, "cold-run", users={"data": str(place / "cold")}, **knobs))


def test_a_task_does_not_start_from_users_rows(place: Path) -> None:
    users = {"data": str(place / "users.jsonl")}
    one = {"chat": tasks(place)["chat"], "moods": tasks(place)["moods"]}  # of another r than the users, and of theirs
    knobs = {"users": users, "tasks": one, "shared": "plain", "warm_start": True, "gate": {"not_worse_than": []}}
    found = by_name(fleet(settings(place, "warm-tasks", **knobs)))
    assert {one.status for one in found.values()} == {"passed"}
    registry = Registry(str(place / "warm-tasks" / "registry"))
    shared = registry.find("shared").revision
    parents = {name: registry.find(name).lineage["parent"] for name in ("ann", "bob", "chat", "moods")}
    assert parents == {"ann": shared, "bob": shared, "chat": None, "moods": None}
    alone = fleet(settings(place, "cold-tasks", tasks=one, gate={"not_worse_than": []}))
    scores = by_name(alone)["moods"].scores
    assert scores is not None and found["moods"].scores is not None
    assert found["moods"].scores["own"]["loss"] == pytest.approx(scores["own"]["loss"], rel=1e-4)


def test_names_that_differ_in_case_only_have_folders_that_do_not(place: Path) -> None:
    two = {name: tasks(place)["moods"] for name in ("moods", "Moods")}
    fleet(settings(place, "case", tasks=two, keep=False))
    assert len({folder.name.lower() for folder in (place / "case" / "adapters").iterdir()}) == 2
