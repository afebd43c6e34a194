"""Tasks by separate adapters, by one on their mixture, and by combined ones."""

from pathlib import Path

import pytest
import torch

from lorafleet.config import FleetConfig
from lorafleet.errors import ConfigError
from lorafleet.files.adapter import load_adapter
from lorafleet.files.manifest import MANIFEST
from lorafleet.fleets.mixture import shares
from lorafleet.fleets.run import fleet
from tests.fleets.given import settings, tasks


@pytest.mark.parametrize(
    ("mixture", "temperature", "wanted"),
    [
        ("proportional", 2, [90, 9, 1]),
        ("equal", 2, [34, 33, 33]),
        ("temperature", 1, [90, 9, 1]),
        ("temperature", 2, [70, 22, 8]),
        ("temperature", 1e9, [34, 33, 33]),
    ],
)
def test_how_often_each_task_comes(mixture: str, temperature: float, wanted: list[int]) -> None:
    config = FleetConfig(mixture=mixture, mixture_temperature=temperature)  # type: ignore[arg-type]
    found = shares([90, 9, 1], config)
    assert sum(found) == 100 and sorted(found, reverse=True) == wanted


def test_every_way_is_measured_on_every_task(place: Path) -> None:
    two = {name: tasks(place)[name] for name in ("moods", "chat")}
    knobs = {
        "shared": "plain",
        "mixture": "equal",
        "combine": ["cat", "ties", "linear"],
        "gate": {"not_worse_than": []},
    }
    result = fleet(settings(place, "ways", tasks=two, **knobs))
    assert [one.name for one in result.members] == ["shared", "moods", "chat"]
    ways = {way.name: way for way in result.ways}
    names = ["the base", "separate adapters", "one shared adapter", *(f"combined by {how}" for how in knobs["combine"])]
    assert list(ways) == names
    moods, chat = (load_adapter(place / "ways" / "adapters" / name).tensors for name in ("moods", "chat"))
    count = sum(tensor.numel() for tensor in [*moods.values(), *chat.values()])
    assert ways["the base"].parameters == 0 and ways["separate adapters"].parameters == count
    assert ways["combined by cat"].parameters == count
    # The tasks' ranks differ, which linear and ties do not take; the table says so.
    assert not ways["combined by ties"].scores and "same r" in (ways["combined by linear"].error or "")
    own = {one.name: one.scores["own"][one.metric] for one in result.members if one.scores}
    assert ways["separate adapters"].scores == {name: own[name] for name in ("moods", "chat")}
    assert {*ways["one shared adapter"].scores} == {"moods", "chat"} == {*ways["combined by cat"].scores}
    page = (place / "ways" / "report.html").read_text()
    assert "Ways to serve all tasks" in page and "combined by cat" in page
    (place / "ways" / "combined" / "cat" / MANIFEST).unlink()  # as if the process was killed before it was written
    again = fleet(settings(place, "ways", tasks=two, resume_from_checkpoint=True, **knobs))
    assert again.ways == result.ways


def test_a_way_has_the_size_of_its_own_adapter_and_is_made_of_this_run(place: Path) -> None:
    two = {name: tasks(place)[name] | {"r": 4} for name in ("chat", "moods")}
    two["moods"]["rank_pattern"] = {"q_proj": 2}
    knobs = settings(place, "sizes", tasks=two, shared="plain", combine=["cat", "linear"], gate={"not_worse_than": []})
    ways = {way.name: way for way in fleet(knobs).ways}
    assert not ways["combined by linear"].scores and "self_attn.q_proj" in (ways["combined by linear"].error or "")
    shared, cat = (place / "sizes" / name for name in ("adapters/shared", "combined/cat"))
    assert ways["one shared adapter"].parameters == sum(one.numel() for one in load_adapter(shared).tensors.values())
    assert ways["one shared adapter"].bytes == (shared / "adapter_model.safetensors").stat().st_size
    first = load_adapter(cat).tensors
    other = {name: task | {"seed": 11} for name, task in two.items()}
    fleet(knobs | {"tasks": other}, overwrite=True)
    second = load_adapter(cat).tensors
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_is_told(place: Path) -> None:
    two = {"shared": tasks(place)["moods"], "chat": tasks(place)["chat"]}
    with pytest.raises(ConfigError, match=r"(?s)tasks have shared = plain.*cannot be called shared"):
        fleet(settings(place, "wrong", tasks=two, shared="keyed"))
    with pytest.raises(ConfigError, match="combine is for tasks"):
        fleet(settings(place, "wrong", users={"data": str(place / "users.jsonl")}, combine=["cat"]))
    with pytest.raises(ConfigError, match="'tise'.*|combine"):
        fleet(settings(place, "wrong", tasks=tasks(place), combine=["tise"]))
