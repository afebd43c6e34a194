"""The space of a search: which knobs are tried with which values.

learning_rate: {log: [1e-5, 1e-3]}                    # between two ends, evenly in the logarithm
r: [4, 8, 16]                                         # any of these
warmup_steps: {range: [0, 40], step: 10}              # evenly between two ends, both included
lora_dropout: {values: [0, 0.1], when: {r: [16]}}     # only where another knob has such a value
linked: [[{r: 8, lora_alpha: 16}, {r: 16, lora_alpha: 32}]]   # sets of values that go together
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, get_args

from lorafleet.config.knob import Section
from lorafleet.config.load import known_names, load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.errors import ConfigError, did_you_mean, faults_of, raise_all
from lorafleet.search.presets import PRESETS

SECTIONS = (LoraConfig, TrainingConfig)
FIXED = {
    "seed": "every trial has the same seed; seeds_per_trial repeats a setting with others",
    "num_train_epochs": "all trials have the same budget",
    "max_steps": "all trials have the same budget",
}
"""Knobs that are no part of a search, and why."""


@dataclass(frozen=True)
class Choice:
    """Any of some values; of a linked set, each value is a mapping of knobs."""

    values: tuple[Any, ...]

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values that stand for all of them."""
        return self.values

    @property
    def names(self) -> tuple[Any, ...]:
        """The values as Optuna stores them: numbers and words as they are, anything else as JSON."""
        return tuple(v if v is None or isinstance(v, str | int | float) else json.dumps(v) for v in self.values)


@dataclass(frozen=True)
class Span:
    """Numbers between two ends, both included.

    Args:
        low: The least.
        high: The largest.
        log: Evenly in the logarithm.
        step: Distance of the values; none for any number between the ends.
        whole: Whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def count(self) -> int | None:
        """How many values there are; none for any number."""
        step = self.step or (1 if self.whole and not self.log else None)
        return None if step is None else int((self.high - self.low) / step + 1e-9) + 1

    @property
    def samples(self) -> tuple[float, ...]:
        """Its two ends."""
        return (self.low, self.high)

    @property
    def values(self) -> tuple[float, ...]:
        """All values, where they can be counted."""
        assert self.count is not None
        return tuple(round(self.low + i * (self.step or 1), 12) for i in range(self.count))


@dataclass(frozen=True)
class Dimension:
    """One thing that is chosen for each trial: a knob's value, or one mapping of a linked set.

    Args:
        name: The knob, or ``linked 1``.
        domain: What it may be.
        when: Values of other knobs at which it is chosen; elsewhere the knob keeps the run's own value.
        linked: Whether its values are mappings of knobs.
    """

    name: str
    domain: Choice | Span
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    linked: bool = False

    def settings(self, value: Any) -> dict[str, Any]:
        """The knobs that a value of it sets."""
        return dict(value) if self.linked else {self.name: value}

    @property
    def knobs(self) -> list[str]:
        """The names of these knobs."""
        return list(self.settings(self.domain.samples[0]))


@dataclass(frozen=True)
class Space:
    """All dimensions of a search, in their order."""

    dimensions: tuple[Dimension, ...]

    @property
    def size(self) -> int | None:
        """Number of all combinations; none where a dimension has any number of values."""
        counts = [dimension.domain.count for dimension in self.dimensions]
        return None if None in counts else prod(count for count in counts if count is not None)

    @property
    def knobs(self) -> list[str]:
        """Every knob that differs between trials."""
        return list(dict.fromkeys(name for one in self.dimensions for name in one.knobs))

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs of a trial, from the values that were chosen."""
        found: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.name in chosen:
                found |= dimension.settings(chosen[dimension.name])
        return found

    def is_active(self, dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
        """Whether a dimension is to be chosen, after those before it."""
        before = self.settings(chosen)
        return all(before.get(knob) in values for knob, values in dimension.when.items())


def in_words(settings: Mapping[str, Any]) -> str:
    """Knobs and values in one line: ``r 8, lora_alpha 16, learning_rate 0.0002``."""
    return ", ".join(f"{name} {f'{v:.3g}' if isinstance(v, float) else v}" for name, v in settings.items())


def parse_space(given: str | Mapping[str, Any], base: Sequence[Section]) -> Space:
    """Read a search space and check every value in it.

    Args:
        given: A preset's name, or a mapping (see the module).
        base: The run's own LoraConfig and TrainingConfig, whose values hold for knobs that are not searched.

    Raises:
        ConfigError: Every fault at once: unknown knobs, empty lists, ends that are no ends, values out of range.
    """
    space, faults = read_space(given, base)
    raise_all(ConfigError, faults, "the search space is wrong")
    return space


def read_space(given: str | Mapping[str, Any], base: Sequence[Section]) -> tuple[Space, list[str]]:
    """The dimensions that are right, and what is wrong with the others, so that more can be checked before stopping."""
    if isinstance(given, str) and given not in PRESETS:
        known = f"the presets are {', '.join(PRESETS)}, or give a mapping of knobs to values"
        return Space(()), [f"space = {given!r} is no preset{did_you_mean(given, PRESETS)}; {known}"]
    given = PRESETS[given] if isinstance(given, str) else given
    faults: list[str] = []
    dimensions = list(_dimensions(given, faults))
    if not dimensions and not faults:
        faults.append("space is empty; name at least one knob and its values")
    owners = [name for one in dimensions for name in one.knobs]
    faults += [f"space: {name} is searched twice; keep one" for name in dict.fromkeys(owners) if owners.count(name) > 1]
    faults += _condition_faults(dimensions)
    wrong = {one.name: _value_faults(one, base) for one in dimensions}
    faults += [fault for found in wrong.values() for fault in found]
    return Space(tuple(one for one in dimensions if not wrong[one.name])), faults


def _dimensions(given: Mapping[str, Any], faults: list[str]) -> Iterator[Dimension]:
    for name, value in given.items():
        if name == "linked":
            yield from _linked(value, faults)
        elif (knob := _knob(name, faults)) is not None:
            when = value.get("when", {}) if isinstance(value, Mapping) else {}
            domain = _domain(knob, value, faults)
            if domain is not None:
                yield Dimension(knob, domain, _when(knob, when, faults))


def _knob(name: Any, faults: list[str]) -> str | None:
    names = known_names(SECTIONS)
    plain = str(name).replace("-", "_")
    knob = names.get(plain)
    if knob is None:
        faults.append(f"space: unknown knob {name!r}{did_you_mean(plain, names)}; a search is over LoRA and training")
    elif knob in FIXED:
        faults.append(f"space: {name} cannot be searched: {FIXED[knob]}")
        return None
    return knob


def _linked(sets: Any, faults: list[str]) -> Iterator[Dimension]:
    if not isinstance(sets, list) or not all(isinstance(one, list) and one for one in sets):
        faults.append("space: linked is a list of sets, each a list of mappings: [[{r: 8, lora_alpha: 16}, …], …]")
        return
    for number, one in enumerate(sets, 1):
        if not all(isinstance(values, Mapping) and values for values in one):
            faults.append(f"space: linked set {number} has something that is no mapping of knobs to values")
            continue
        mappings = [{_knob(name, faults) or name: value for name, value in values.items()} for values in one]
        if any(mapping.keys() != mappings[0].keys() for mapping in mappings):
            faults.append(f"space: linked set {number} names other knobs in one mapping than in another")
        yield Dimension(f"linked {number}", Choice(tuple(mappings)), linked=True)


def _domain(knob: str, value: Any, faults: list[str]) -> Choice | Span | None:
    if isinstance(value, Mapping):
        kinds = [kind for kind in ("log", "range", "values") if kind in value]
        unknown = [key for key in value if key not in ("log", "range", "values", "step", "when")]
        if len(kinds) != 1 or unknown:
            what = f"unknown key {unknown[0]!r}" if unknown else "one of log, range and values is needed"
            faults.append(
                f"space: {knob}: {what}; write {{log: [a, b]}}, {{range: [a, b], step: c}} or {{values: […]}}"
            )
            return None
        if kinds[0] != "values":
            return _span(knob, value, kinds[0] == "log", faults)
        value = value["values"]
    if not isinstance(value, list):
        faults.append(f"space: {knob} = {value!r} is one value; give a list to search, or set it outside of space")
        return None
    if not value:
        faults.append(f"space: {knob} has an empty list; name at least one value")
        return None
    if len({json.dumps(one) for one in value}) != len(value):
        faults.append(f"space: {knob} names a value twice")
    return Choice(tuple(value))


def _span(knob: str, value: Mapping[str, Any], log: bool, faults: list[str]) -> Span | None:
    kind = "log" if log else "range"
    ends, step = value[kind], value.get("step")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends)
    if not numbers or ends[0] >= ends[1] or (log and ends[0] <= 0):
        above = ", both above 0" if log else ""
        faults.append(f"space: {knob}: {kind} is two numbers, the smaller first{above}; got {ends!r}")
        return None
    if step is not None and (log or not _is_number(step) or step <= 0):
        faults.append(f"space: {knob}: step = {step!r} is for range, and above 0")
        return None
    whole = _is_whole(knob)
    if whole and not all(float(n).is_integer() for n in (*ends, step or 1)):
        faults.append(f"space: {knob} is a whole number; {kind} = {ends!r}" + (f", step = {step!r}" if step else ""))
        return None
    low, high = (int(end) if whole else float(end) for end in ends)
    return Span(low, high, log, step, whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(knob: str) -> bool:
    annotation = next(section.model_fields[knob].annotation for section in SECTIONS if knob in section.model_fields)
    return int in {annotation, *get_args(annotation)}


def _when(knob: str, given: Any, faults: list[str]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, Mapping):
        faults.append(f"space: {knob}: when is a mapping of other knobs to their values; got {given!r}")
        return {}
    found = {}
    for name, values in given.items():
        other = _knob(name, faults)
        if other is not None:
            found[other] = tuple(values) if isinstance(values, list) else (values,)
    return found


def _condition_faults(dimensions: Sequence[Dimension]) -> Iterator[str]:
    before: dict[str, list[Any]] = {}
    for one in dimensions:
        for knob, values in one.when.items():
            if knob not in before:
                yield f"space: {one.name}: when names {knob}, which is not searched before it"
            elif before[knob] and not set(map(repr, values)) & set(map(repr, before[knob])):
                yield f"space: {one.name}: {knob} is never {' or '.join(map(str, values))}, so it is never tried"
        for knob in one.knobs:
            samples = [one.settings(value).get(knob) for value in one.domain.samples]
            before[knob] = samples if isinstance(one.domain, Choice) else []


def _value_faults(dimension: Dimension, base: Sequence[Section]) -> list[str]:
    """What is wrong with a dimension's values, by the knobs' own rules."""
    own = {key: value for section in base for key, value in section.model_dump().items()}
    faults = []
    for value in dimension.domain.samples:
        known = {name: v for name, v in dimension.settings(value).items() if name in known_names(SECTIONS)}
        try:
            load_sections(SECTIONS, own, known)
        except ConfigError as error:
            faults += [f"space: {fault}" for fault in faults_of(error)]
    return list(dict.fromkeys(faults))


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination of a countable space, as chosen values by dimension; inactive dimensions are left out."""
    seen = set()
    for values in product(*(dimension.domain.values for dimension in space.dimensions)):
        chosen: dict[str, Any] = {}
        for dimension, value in zip(space.dimensions, values, strict=True):
            if space.is_active(dimension, chosen):
                chosen[dimension.name] = value
        key = json.dumps(chosen)
        if key not in seen:
            seen.add(key)
            yield chosen
