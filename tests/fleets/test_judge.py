"""One adapter's judgement is its own: what goes wrong with it stops no other, and a verdict is of what was asked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import ModelError
from lorafleet.evaluation.measure import measure
from lorafleet.files.adapter import WEIGHTS, save_adapter
from lorafleet.fleets.result import FleetResult
from lorafleet.fleets.run import fleet
from lorafleet.lora import BASE_ONLY
from lorafleet.registry.registry import Registry
from tests.fleets.given import KNOBS, by_name, settings, tasks, write

ANY = {"not_worse_than": []}


def two(place: Path, **changes: Any) -> dict[str, Any]:
    """A task with labels, to which the changes go, and after it one without."""
    return {"moods": tasks(place)["moods"] | changes, "chat": tasks(place)["chat"]}


def statuses(result: FleetResult) -> dict[str, str]:
    return {one.name: one.status for one in result.members}


def test_a_changed_gate_judges_again_and_leaves_the_alias(place: Path) -> None:
    knobs = settings(place, "again", tasks=two(place), gate=ANY)
    assert statuses(fleet(knobs)) == {"moods": "passed", "chat": "passed"}
    strict = knobs | {"tasks": two(place, gate={"at_most": {"loss": 0.01}})}
    result = by_name(fleet(strict, resume_from_checkpoint=True))
    assert (result["moods"].status, result["chat"].status) == ("rejected", "passed")
    assert result["moods"].version == "moods:1"
    assert result["moods"].notes == ("moods:1 has the same bytes and stays prod",)
    registry = Registry(knobs["registry"])
    assert registry.find("moods@prod").label == "moods:1" and registry.find("moods:1").rejected is None
    assert "stays prod" in (place / "again" / "report.md").read_text()
    assert statuses(fleet(knobs, resume_from_checkpoint=True)) == {"moods": "passed", "chat": "passed"}


@pytest.mark.parametrize("change", ["alias", "registry"])
def test_a_verdict_is_kept_where_it_is_asked_for(place: Path, change: str) -> None:
    knobs = settings(place, f"moved-{change}", tasks=two(place), gate=ANY)
    fleet(knobs)
    changed = knobs | {change: {"alias": "staging", "registry": str(place / "elsewhere")}[change]}
    fleet(changed, resume_from_checkpoint=True)
    registry = Registry(changed["registry"])
    assert registry.find(f"moods@{changed.get('alias', 'prod')}").label == "moods:1"


def put_in_use(registry: Registry, name: str, folder: Path) -> None:
    registry.promote(registry.add(folder, name).label)


@pytest.mark.parametrize("what", ["missing", "of other shapes", "of other layers", "of another base"])
def test_what_is_in_use_and_cannot_be_measured_is_told(place: Path, what: str) -> None:
    run = f"use {what}".replace(" ", "-")
    knobs = settings(place, run, gate=ANY)
    registry = Registry(knobs["registry"], create=True)
    other = place / f"{run}-other"
    module = {"of other layers": "fc1"}.get(what, "q_proj")
    path, width = f"base_model.model.model.layers.0.self_attn.{module}", 16 if what == "of other shapes" else 32
    factors = {f"{path}.lora_A.weight": torch.zeros(2, width), f"{path}.lora_B.weight": torch.zeros(32, 2)}
    metadata = {"base_weights_hash": "of another"} if what == "of another base" else {}
    save_adapter(other, LoraConfig(r=2, target_modules=[module]), factors, base_name="other", metadata=metadata)
    for name in ("moods", "asks"):
        put_in_use(registry, name, other)
    if what == "missing":
        (Path(knobs["registry"]) / "blobs" / registry.find("moods").files[WEIGHTS]).unlink()
    asks = tasks(place)["moods"] | {"gate": {"not_worse_than": ["prod"]}}
    result = by_name(fleet(knobs | {"tasks": {"asks": asks, **two(place)}}))
    assert {name: one.status for name, one in result.items()} == {
        "asks": "rejected",
        "moods": "passed",
        "chat": "passed",
    }
    for told in (result["asks"].reasons, result["moods"].notes):
        assert len(told) == 1 and told[0].startswith("not compared with prod: ")
    assert not result["chat"].notes
    alone = fleet(settings(place, f"{run}-alone", tasks={"moods": tasks(place)["moods"]}, gate=ANY, keep=False))
    assert alone.members[0].scores == result["moods"].scores, "nothing of it stays in a slot"


def test_a_first_version_has_no_prod_to_beat(place: Path) -> None:
    result = fleet(settings(place, "first", tasks=two(place), gate={"better_than": ["prod"], "not_worse_than": []}))
    assert statuses(result) == {"moods": "passed", "chat": "passed"} and not result.members[0].notes


def test_a_shared_adapter_that_failed_is_told(place: Path) -> None:
    calm = {key: KNOBS[key] for key in ("learning_rate", "max_steps")} | {"max_grad_norm": 1.0}
    members = {name: task | calm for name, task in two(place).items()}
    members["moods"] |= {"gate": {"better_than": ["shared"]}}
    wild = KNOBS | {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 6}
    found = by_name(fleet(settings(place, "no-shared", tasks=members, shared="plain", defaults=wild, gate=ANY)))
    assert {name: one.status for name, one in found.items()} == {
        "shared": "failed",
        "moods": "rejected",
        "chat": "passed",
    }
    told = f"not compared with shared: {found['shared'].reasons[0]}"
    assert found["chat"].notes == (told,) and not found["moods"].notes
    assert found["moods"].reasons == (f"{told}; take shared out of the gate to be judged without it",)


def measured_with(monkeypatch: pytest.MonkeyPatch, change: Any, only: int = 0, task: str = "label") -> None:
    """Let the measurement of a slot's adapter on rows of a task come to something else."""

    def changed(base: Any, loss_model: Any, slot: int, data: Any, rows: Any, **options: Any) -> dict[str, float]:
        scores = measure(base, loss_model, slot, data, rows, **options)
        return change(scores, options["predictions"]) if slot == only and data.task == task else scores

    monkeypatch.setattr("lorafleet.fleets.measure.measure", changed)


def lost(scores: dict[str, float], predictions: list[dict[str, Any]]) -> dict[str, float]:
    """A measurement that comes to no number."""
    for one in predictions:
        one["loss_sum"] = math.nan
    return scores | {"loss": math.nan}


def test_one_that_cannot_be_measured_fails_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_numbers(scores: dict[str, float], predictions: list[dict[str, Any]]) -> dict[str, float]:
        raise ModelError("the logits are not numbers")

    knobs = settings(place, "unmeasured", tasks=two(place), gate=ANY)
    with monkeypatch.context() as patch:
        measured_with(patch, no_numbers)
        result = fleet(knobs)
    assert statuses(result) == {"moods": "failed", "chat": "passed"}
    assert result.members[0].reasons == ("the logits are not numbers",) and result.members[0].tokens
    assert "the logits are not numbers" in (place / "unmeasured" / "report.md").read_text()
    assert statuses(fleet(knobs, resume_from_checkpoint=True)) == {"moods": "passed", "chat": "passed"}


def test_a_loss_that_is_no_number_is_rejected_and_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_with(monkeypatch, lost)
    users = {"data": str(place / "users.jsonl")}
    knobs = settings(place, "nan-users", users=users, shared="none", gate={"metric": "loss", **ANY})
    for resume in (False, True):
        result = fleet(knobs, resume_from_checkpoint=resume)
        assert {*statuses(result).values()} == {"rejected"} and result.pooled == {}
        one = result.members[0]
        assert one.reasons == ("loss is no number (nan)",) and one.gain is None
        assert one.scores is not None and math.isnan(one.scores["own"]["loss"])
        assert (
            json.loads((place / "nan-users" / "fleet.json").read_text())["members"][0]["scores"]["own"]["loss"] is None
        )


def test_a_rival_whose_loss_is_no_number_is_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_with(monkeypatch, lost, only=BASE_ONLY, task="chat")
    rows = [{"user": user, "prompt": f"say {i}", "completion": "yes"} for user in ("ann", "bob") for i in range(9)]
    write(place / "asked.jsonl", rows)
    knobs = settings(place, "nan-base", users={"data": str(place / "asked.jsonl")}, shared="plain", gate=ANY)
    for resume in (False, True):
        result = fleet(knobs, resume_from_checkpoint=resume)
        assert {*statuses(result).values()} == {"passed"} and result.pooled_gains.keys() == {"shared"}


def test_a_key_that_makes_rows_too_long_is_told(place: Path) -> None:
    users = ("an", "bo", "a name that is long")
    longer = {"an": ["say 1 and then 2 and"]}
    (place / "long").mkdir()
    for name, prompts in (("train", ["say 1", "say 2"]), ("test", ["say 7"])):
        asked = [(user, prompt) for user in users for prompt in [*prompts, *longer.get(user, [])]]
        rows = [json.dumps({"user": user, "prompt": prompt, "completion": "yes"}) for user, prompt in asked]
        (place / "long" / f"{name}.jsonl").write_text("\n".join(rows))
    knobs = {"users": {"data": str(place / "long")}, "defaults": KNOBS | {"max_length": 24}, "gate": ANY}
    found = by_name(fleet(settings(place, "long-run", **knobs)))
    assert {one.status for one in found.values()} == {"passed"}
    keyed = {user: "shared keyed" in (found[user].scores or {}) for user in users}
    assert keyed == {"an": False, "bo": True, "a name that is long": False}
    assert found["an"].notes == ("not compared with shared keyed: with the key before them, 1 of 2 rows can be used",)
    assert "max_length is 24" in found["a name that is long"].notes[0] and not found["bo"].notes
