"""``fleet.yml`` as a plan. Whatever is wrong with its structure is told at once, before anything starts.

model: smollm2-135m            # the base, the run's and the registry's knobs, and the fleet's own
output_dir: runs/fleet
defaults: {r: 8, learning_rate: 2e-4, num_train_epochs: 3}
gate: {at_least: {accuracy: 0.6}, better_than: [prod]}
tasks:
  reviews: {data: reviews.jsonl, gate: {at_least: {accuracy: 0.8}}}
  topics: {data: topics/, r: 16}
users: {data: ratings/, key: user, min_rows: 20}
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.fleet import FLEET_DEFAULTS, FleetConfig, GateConfig, UsersConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.training import PopulationConfig, RunConfig, TrainingConfig
from lorafleet.config.yaml_text import read_mapping
from lorafleet.errors import ConfigError, faults_of, raise_all
from lorafleet.registry.names import name_fault

SECTIONS = (ModelConfig, RunConfig, PopulationConfig, RegistryConfig, FleetConfig)
_NESTED = ("defaults", "gate", "tasks", "users")


@dataclass(frozen=True)
class MemberPlan:
    """One adapter of a fleet.

    Attributes:
        name: Its name, in the registry too.
        data: Its rows.
        lora: What it looks like.
        training: How it trains.
        gate: What it must reach.
    """

    name: str
    data: DataConfig
    lora: LoraConfig
    training: TrainingConfig
    gate: GateConfig


@dataclass(frozen=True)
class FleetPlan:
    """A whole fleet.

    Attributes:
        source: The file's mapping, knobs that override it included; runnable again.
        model: The base.
        run: What the run does around training.
        population: How many train together.
        registry: Where adapters are kept.
        fleet: What is done with them.
        tasks: Members with rows of their own.
        defaults: What a member without knobs of its own is like.
        users: Where members come from that are users of one file.
        user_knobs: What the users' members have in common: data without a source, shape, training, gate.
    """

    source: dict[str, Any]
    model: ModelConfig
    run: RunConfig
    population: PopulationConfig
    registry: RegistryConfig
    fleet: FleetConfig
    tasks: tuple[MemberPlan, ...]
    defaults: MemberPlan
    users: UsersConfig | None
    user_knobs: MemberPlan | None


def read_plan(source: Mapping[str, Any] | str | os.PathLike[str], knobs: Mapping[str, Any]) -> FleetPlan:
    """Read a fleet.

    Args:
        source: A YAML file, or the same as a mapping.
        knobs: Knobs of the top level, which override the file's.

    Raises:
        ConfigError: Every fault of the structure at once: unknown keys, wrong values, names that cannot be.
    """
    faults = list[str]()
    if not isinstance(source, Mapping):
        source = {entry.name: entry.value for entry in read_mapping(Path(source), faults)}
    entries = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in source.items()}
    whole_source = {**entries, **knobs}
    nested = {key: _mapping(key, entries.pop(key, None), faults) for key in _NESTED}
    unknown = [key for key in entries if isinstance(key, str) and key.replace("-", "_") in _member_keys()]
    faults += [f"{key} belongs to an adapter: put it under defaults, or under a task" for key in unknown]
    rest = {key: value for key, value in entries.items() if key not in unknown}
    whole = _sections(SECTIONS, rest, knobs, "", faults)
    if fault := name_fault(str(whole_source.get("alias", "prod")), "alias"):
        faults.append(fault)
    if not nested["tasks"] and not nested["users"]:
        faults.append("a fleet needs tasks: {NAME: {data: …}} or users: {data: …}")
    defaults = _member("defaults", {"data": "?"}, nested, faults)
    tasks = [
        _member(name, _mapping(f"tasks.{name}", task, faults), nested, faults) for name, task in nested["tasks"].items()
    ]
    users = user_knobs = None
    if nested["users"]:
        (users,) = _sections((UsersConfig,), nested["users"], {}, "users", faults) or (None,)
        own = {"data": str(nested["users"].get("data", "?")), "valid_fraction": 0.0}
        user_knobs = _member("users", own, nested, faults)
    raise_all(ConfigError, faults, "the fleet cannot start")
    assert whole is not None and defaults is not None
    for once in ("overwrite", "resume_from_checkpoint", "resume"):
        whole_source.pop(once, None)  # what one call was allowed to do
    model, run, population, registry, fleet = whole
    if "save_strategy" not in run.model_fields_set:
        run = run.model_copy(update=FLEET_DEFAULTS)
    named = tuple(one for one in tasks if one is not None)
    return FleetPlan(whole_source, model, run, population, registry, fleet, named, defaults, users, user_knobs)


def _member(name: Any, own: Mapping[str, Any], nested: Mapping[str, Any], faults: list[str]) -> MemberPlan | None:
    """A task's plan: its own knobs over the defaults."""
    if fault := name_fault(str(name)):
        faults.append(fault)
    knobs = dict(own)
    gate = _mapping(f"{name}.gate", knobs.pop("gate", None), faults)
    found = _sections((DataConfig, LoraConfig, TrainingConfig), nested["defaults"], knobs, str(name), faults)
    gates = _sections((GateConfig,), nested["gate"], gate, f"{name}.gate", faults)
    return MemberPlan(str(name), *found, *gates) if found and gates else None


def _sections(
    sections: tuple[type[Any], ...], source: Mapping[str, Any], knobs: Mapping[str, Any], where: str, faults: list[str]
) -> Any:
    """The sections, or None and their faults with the place in front."""
    try:
        return load_sections(sections, source, {str(key): value for key, value in knobs.items()})
    except ConfigError as error:
        prefix = f"{where}: " if where else ""
        # What is wrong with the defaults is wrong with every member.
        new = [fault for fault in faults_of(error) if f"defaults: {fault}" not in faults]
        faults += [prefix + fault for fault in new if prefix + fault not in faults]
        return None


def _mapping(where: str, value: Any, faults: list[str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        faults.append(f"{where} should be a mapping, not {value!r}")
        return {}
    return dict(value)


def _member_keys() -> Iterator[str]:
    for section in (DataConfig, LoraConfig, TrainingConfig):
        yield from section.model_fields
