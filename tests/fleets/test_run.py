"""A fleet from its file to the registry, on a tiny base: together as alone, each with its own rows, resumed exactly."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cli.main import main
from lorafleet.errors import AdapterError, ConfigError, DataError, Interrupted, TrainingError
from lorafleet.files.adapter import load_adapter
from lorafleet.files.atomic import write_new_file
from lorafleet.files.checkpoint import load_checkpoint, newest_checkpoint
from lorafleet.fleets.run import fleet
from lorafleet.registry.registry import Registry
from lorafleet.registry.upkeep import verify
from lorafleet.training.run import train
from tests.fleets.given import KNOBS, by_name, settings, tasks, user_rows, write


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_adapter(folder).tensors


def test_tasks(place: Path) -> None:
    result = fleet(settings(place, "tasks", tasks=tasks(place), gate={"not_worse_than": []}))
    found = by_name(result)
    assert {name: one.status for name, one in found.items()} == {
        "moods": "passed",
        "chat": "passed",
        "broken": "left out",
    }
    assert "broken.jsonl:2" in found["broken"].reasons[0]
    assert found["moods"].scores is not None and {"own", "base", "majority"} == found["moods"].scores.keys()
    assert (found["moods"].metric, found["chat"].metric) == ("accuracy", "loss")
    assert (found["moods"].trained_rows, found["moods"].measured_rows, found["moods"].steps) == (16, 4, 3)
    registry = Registry(str(place / "tasks" / "registry"))
    assert registry.find("moods@prod").label == found["moods"].version == "moods:1"
    assert registry.find("chat").scores == found["chat"].scores["own"]  # type: ignore[index]
    verify(registry)
    weights = registry.find("moods").files["adapter_model.safetensors"]
    kept = place / "tasks" / "adapters" / "moods" / "adapter_model.safetensors"
    assert kept.samefile(place / "tasks" / "registry" / "blobs" / weights)  # on the disk once
    report = (place / "tasks" / "report.html").read_text()
    assert "3 adapters: 2 passed, 1 left out" in report and "broken.jsonl:2" in report and "<svg" in report
    assert json.loads((place / "tasks" / "fleet.json").read_text())["model"] == result.model
    alone = train(
        {"model": str(place / "base"), "output_dir": str(place / "alone"), "eval_strategy": "no"}
        | KNOBS
        | tasks(place)["chat"]
    )
    mine = tensors(place / "tasks" / "adapters" / "chat")
    for name, wanted in tensors(Path(alone.adapter)).items():
        torch.testing.assert_close(mine[name], wanted, rtol=1e-4, atol=1e-6)
    assert found["chat"].scores is not None
    assert found["chat"].scores["own"]["loss"] == pytest.approx(alone.eval_loss, rel=1e-4)


def test_a_sorted_file_is_measured_on_all_its_labels(place: Path) -> None:
    rows = [{"text": f"the day {i}", "label": "good" if i < 20 else "bad"} for i in range(40)]
    (place / "sorted").mkdir()
    for name in ("train", "test"):
        write(place / "sorted" / f"{name}.jsonl", rows)
    tasks = {"moods": {"data": str(place / "sorted")}}
    scores = fleet(settings(place, "measured", tasks=tasks, keep=False, max_eval_rows=10)).members[0].scores
    assert scores is not None and 0 < scores["majority"]["accuracy"] < 1


def test_a_gate_that_is_not_passed(place: Path) -> None:
    one = {"moods": tasks(place)["moods"] | {"gate": {"at_most": {"loss": 0.01}}}}
    registry = str(place / "shared-registry")
    first = fleet(settings(place, "strict", tasks=one, registry=registry))
    assert first.members[0].status == "rejected"
    assert "loss" in first.members[0].reasons[0] and "is above 0.0100" in first.members[0].reasons[0]
    kept = Registry(registry)
    assert kept.find("moods:1").rejected == "; ".join(first.members[0].reasons)
    assert kept.find("moods:1").aliases == ()
    good = {"moods": tasks(place)["moods"] | {"seed": 1}}
    second = fleet(settings(place, "good", tasks=good, registry=registry, gate={"not_worse_than": []}))
    assert second.members[0].version == "moods:2"
    third = fleet(settings(place, "third", tasks=one, registry=registry))
    assert third.members[0].scores is not None and "prod" in third.members[0].scores
    assert kept.find("moods@prod").label == "moods:2"


def test_users_with_shared_adapters(place: Path) -> None:
    result = fleet(settings(place, "users", users={"data": str(place / "users.jsonl")}, gate={"not_worse_than": []}))
    found = by_name(result)
    assert [one.kind for one in result.members] == ["shared", "shared", "user", "user", "user"]
    assert found["ann"].scores is not None
    assert {"own", "base", "shared", "shared keyed", "majority"} == found["ann"].scores.keys()
    assert {"own", "base", "shared", "shared keyed", "majority"} == result.pooled.keys()
    assert result.pooled["majority"] == 1.0
    assert len(found) == 5 and any(name.startswith("cy-7-") for name in found)


def test_labels_that_nobody_gave_yet_are_the_authors(place: Path) -> None:
    users, defaults = {"data": str(place / "users.jsonl")}, KNOBS | {"labels": ["odd", "good"]}
    fleet(settings(place, "author", users=users, defaults=defaults, keep=False))
    for name in ("ann", "shared", "shared keyed"):
        assert load_adapter(place / "author" / "adapters" / name).metadata["labels"] == ["bad", "good", "odd"]


def test_a_broken_row_of_one_user_rejects_that_user_alone(place: Path) -> None:
    write(place / "bad.jsonl", [*user_rows({"ann": "good", "bob": "bad"}), {"user": "bob", "text": "no label"}])
    users = {"data": str(place / "bad.jsonl")}
    found = by_name(fleet(settings(place, "bad", users=users, shared="plain", gate={"not_worse_than": []})))
    assert {name: one.status for name, one in found.items()} == {"shared": "passed", "ann": "passed", "bob": "left out"}
    assert "cannot be used" in found["bob"].reasons[0]


def test_no_row_reaches_another_users_adapter(place: Path) -> None:
    def train_users(name: str, moods: dict[str, str]) -> Path:
        write(place / f"{name}.jsonl", user_rows(moods))
        users = {"data": str(place / f"{name}.jsonl")}
        fleet(settings(place, name, users=users, shared="none", keep=False, population_size=3))
        return place / name / "adapters"

    first = train_users("one", {"ann": "good", "bob": "bad", "cy": "bad"})
    second = train_users("two", {"ann": "good", "bob": "good", "cy": "bad"})
    for name, equal in (("ann", True), ("cy", True), ("bob", False)):
        a, b = tensors(first / name), tensors(second / name)
        assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a) == equal
    assert not (place / "one" / "registry").exists()


def test_a_warm_start(place: Path) -> None:
    changes = {"users": {"data": str(place / "users.jsonl")}, "shared": "plain", "warm_start": True}
    frozen = KNOBS | {"learning_rate": 1e-12}
    fleet(settings(place, "warm", **changes, defaults=KNOBS))
    shared = tensors(place / "warm" / "adapters" / "shared")
    fleet(settings(place, "still", **changes, defaults=frozen))
    started = tensors(place / "still" / "adapters" / "ann")
    assert all(torch.allclose(started[key], one) for key, one in tensors(place / "still/adapters/shared").items())
    moved = tensors(place / "warm" / "adapters" / "ann")
    assert any(not torch.allclose(moved[key], one) for key, one in shared.items())
    registry = Registry(str(place / "warm" / "registry"))
    assert registry.find("ann:1").lineage["parent"] == registry.find("shared:1").revision


def test_a_rejected_shared_adapter_stays_rejected_as_a_parent(place: Path) -> None:
    changes = {"users": {"data": str(place / "users.jsonl")}, "shared": "plain", "warm_start": True}
    fleet(settings(place, "none-pass", **changes, gate={"at_most": {"loss": 0.0}}))
    registry = Registry(str(place / "none-pass" / "registry"))
    assert registry.find("shared:1").rejected is not None
    assert registry.find("ann:1").lineage["parent"] == registry.find("shared:1").revision


@contextmanager
def stops_after(steps: int) -> Iterator[Any]:
    asked = iter(range(steps))
    yield lambda: next(asked, None) is None


def test_an_interrupted_fleet_goes_on_as_if_it_had_not_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fleet(settings(place, "whole", tasks=tasks(place)))
    broken = settings(place, "stopped", tasks=tasks(place))
    with monkeypatch.context() as patch:
        patch.setattr("lorafleet.training.queued.listen", lambda: stops_after(1))
        with pytest.raises(Interrupted, match="--resume-from-checkpoint true"):
            fleet(broken)
    before = load_checkpoint(newest_checkpoint(place / "stopped"))[1]["extra"]["seconds"]
    resumed = fleet(broken, resume_from_checkpoint=True)
    assert before < resumed.train_seconds < resumed.seconds, "what was trained before the interruption counts"
    for one, other in zip(whole.members, resumed.members, strict=True):
        assert (one.name, one.scores, one.status, one.steps, one.tokens) == (
            other.name,
            other.scores,
            other.status,
            other.steps,
            other.tokens,
        )
    for name in ("moods", "chat"):
        files = [place / run / "adapters" / name / "adapter_model.safetensors" for run in ("whole", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_full_disk_while_adapters_are_written_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = settings(place, "full", tasks=tasks(place))

    def full(path: Path, data: bytes) -> None:
        if "chat" in path.parts:
            raise OSError(28, "No space left on device")
        write_new_file(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("lorafleet.files.atomic.write_new_file", full)
        with pytest.raises(AdapterError, match="cannot write the adapter to .*chat: No space left on device"):
            fleet(knobs)
    assert tensors(place / "full" / "adapters" / "moods"), "the one beside it is whole"
    assert not list((place / "full" / "adapters" / "chat").glob("*.safetensors*"))
    assert {one.status for one in fleet(knobs, resume_from_checkpoint=True).members} == {"passed", "left out"}


@pytest.mark.parametrize(("tokens", "together"), [(100, 1), (200, 2), (10**6, 3)])
def test_as_many_train_together_as_fill_a_pass(
    place: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, together: int
) -> None:
    users = {"data": str(place / "users.jsonl"), "key": "user", "min_rows": 2, "held_out": 0.4}
    knobs = settings(place, f"pass-{tokens}", users=users, shared="none", keep=False, population_size=None)
    knobs["device"] = "cpu"
    monkeypatch.setattr("lorafleet.training.capacity.TOKENS_OF_A_PASS", tokens)
    assert fleet(knobs).population_size == together
    assert fleet(knobs | {"population_size": 3, "output_dir": str(place / f"all-{tokens}")}).population_size == 3
    extra = load_checkpoint(newest_checkpoint(place / f"all-{tokens}"))[1]["extra"]
    assert min(3, extra["together"]) == together


def test_what_is_trained_again_is_judged_again(place: Path) -> None:
    knobs = settings(place, "back", tasks=tasks(place), save_steps=1, save_total_limit=9, gate={"not_worse_than": []})
    fleet(knobs)
    judged = place / "back" / "adapters" / "moods" / "judged.json"
    told = json.loads(judged.read_text())
    judged.write_text(json.dumps(told | {"result": told["result"] | {"status": "rejected"}}))
    for start, status in ((True, "rejected"), (str(place / "back" / "checkpoint-1"), "passed")):
        assert by_name(fleet(knobs, resume_from_checkpoint=start))["moods"].status == status
    verify(Registry(str(place / "back" / "registry")))


def test_a_nan_stops_its_adapter_alone(place: Path) -> None:
    wild = {"wild": tasks(place)["moods"] | {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 6}}
    result = by_name(fleet(settings(place, "wild", tasks=tasks(place) | wild, gate={"not_worse_than": []})))
    assert result["wild"].status == "failed" and "moods.jsonl" in result["wild"].reasons[0]
    assert result["moods"].status == "passed"
    with pytest.raises(TrainingError, match="every adapter failed; the first"):
        fleet(settings(place, "all-wild", tasks=wild))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tasks": {"a": {"data": "nowhere.jsonl"}}},
            DataError,
            "no member has rows to train on; the first: .*nowhere",
        ),
        ({"tasks": {"a": {"data": "x", "target_modules": ["q"]}}}, ConfigError, "target_modules"),
        ({"shared": "keyed", "tasks": {"a": {"data": "x"}}}, ConfigError, "shared = 'keyed' is for users"),
        ({"warm_start": True, "tasks": {"a": {"data": "x"}}}, ConfigError, "warm_start needs users"),
        ({"users": {"data": "users.jsonl", "key": "usr"}}, DataError, "did you mean 'user'"),
        ({"users": {"data": "users.jsonl"}, "tasks": {"ann": {"data": "x"}}}, ConfigError, "one name: ann"),
    ],
)
def test_what_cannot_start(
    place: Path, changes: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(error, match=message):
        fleet(settings(place, "nothing", **changes))
    assert not list((place / "nothing").glob("adapters/*"))


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "fleet.yml").write_text(json.dumps(settings(place, "command", tasks=tasks(place))))
    assert main(["fleet", str(place / "fleet.yml")]) == 0
    text = capsys.readouterr().out
    for part in ("moods", "left out", "The report:", "adapters together"):
        assert part in text
    assert main(["fleet", str(place / "command" / "lorafleet.yaml"), "--overwrite", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["members"]) == 3
