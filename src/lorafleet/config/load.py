"""Knobs from YAML, Python and flags into validated sections, and back into YAML."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, overload

from pydantic import ValidationError

from lorafleet.config.knob import Section, Switches, other_names, switches
from lorafleet.config.yaml_text import Entry, dump_mapping, read_mapping
from lorafleet.errors import ConfigError, did_you_mean, raise_all

A = TypeVar("A", bound=Section)
B = TypeVar("B", bound=Section)
C = TypeVar("C", bound=Section)
D = TypeVar("D", bound=Section)
E = TypeVar("E", bound=Section)
F = TypeVar("F", bound=Section)
G = TypeVar("G", bound=Section)
H = TypeVar("H", bound=Section)

Source = Mapping[str, Any] | str | os.PathLike[str] | None


class Given(NamedTuple):
    """A value as the user gave it: under which name, and where."""

    name: str
    value: Any
    place: str


@overload
def load_sections(sections: tuple[type[A]], source: Source, knobs: Mapping[str, Any]) -> tuple[A]: ...
@overload
def load_sections(sections: tuple[type[A], type[B]], source: Source, knobs: Mapping[str, Any]) -> tuple[A, B]: ...
@overload
def load_sections(
    sections: tuple[type[A], type[B], type[C]], source: Source, knobs: Mapping[str, Any]
) -> tuple[A, B, C]: ...
@overload
def load_sections(
    sections: tuple[type[A], type[B], type[C], type[D]], source: Source, knobs: Mapping[str, Any]
) -> tuple[A, B, C, D]: ...
@overload
def load_sections(
    sections: tuple[type[A], type[B], type[C], type[D], type[E]], source: Source, knobs: Mapping[str, Any]
) -> tuple[A, B, C, D, E]: ...
@overload
def load_sections(
    sections: tuple[type[A], type[B], type[C], type[D], type[E], type[F]], source: Source, knobs: Mapping[str, Any]
) -> tuple[A, B, C, D, E, F]: ...
@overload
def load_sections(
    sections: tuple[type[A], type[B], type[C], type[D], type[E], type[F], type[G]],
    source: Source,
    knobs: Mapping[str, Any],
) -> tuple[A, B, C, D, E, F, G]: ...
@overload
def load_sections(
    sections: tuple[type[A], type[B], type[C], type[D], type[E], type[F], type[G], type[H]],
    source: Source,
    knobs: Mapping[str, Any],
) -> tuple[A, B, C, D, E, F, G, H]: ...
@overload
def load_sections(
    sections: tuple[type[Section], ...], source: Source, knobs: Mapping[str, Any]
) -> tuple[Section, ...]: ...


def load_sections(sections: tuple[type[Section], ...], source: Source, knobs: Mapping[str, Any]) -> tuple[Section, ...]:
    """Read knobs from a file or mapping, let ``knobs`` override them, and validate everything once.

    Keys are flat: all sections share one mapping. A knob is accepted under its own name and its other names, with
    dashes or underscores. A key that two sections share goes to both; one of a section that only stands beside them
    (``Section.beside``) goes to none.

    Args:
        sections: The sections to fill, in the order in which they are returned.
        source: A YAML file, a mapping, or nothing.
        knobs: Values that replace those of ``source``.

    Returns:
        One validated instance per section.

    Raises:
        ConfigError: Every fault at once: unreadable YAML with line and column, unknown keys, a knob given twice,
            wrong types and limits, missing required knobs.
    """
    faults: list[str] = []
    known = (*(other for section in sections for other in section.beside), *sections)
    keys = known_names(known)
    meanings = {name: values for s in known for key in s.model_fields for name, values in switches(s, key).items()}
    given = _resolve(_read_source(source), keys, meanings, faults)
    given |= _resolve([Entry(name, value, "") for name, value in knobs.items()], keys, meanings, faults)
    filled = [_fill(section, given, faults) for section in sections]
    raise_all(ConfigError, faults, "the configuration is wrong")
    return tuple(section for section in filled if section is not None)


def dump_sections(*sections: Section) -> str:
    """Write sections as one flat YAML mapping that ``load_sections`` reads back to equal sections.

    Raises:
        ConfigError: Two sections hold different values for a key they share.
    """
    values: dict[str, Any] = {}
    faults, parts = [], []
    for section in sections:
        own = section.model_dump(mode="python")
        faults += [
            f"{key} is {values[key]!r} in one section and {value!r} in {type(section).__name__}"
            for key, value in own.items()
            if key in values and values[key] != value
        ]
        new = {key: value for key, value in own.items() if key not in values}
        values |= new
        if new:
            parts.append(f"# {(type(section).__doc__ or '').splitlines()[0]}\n{dump_mapping(new)}")
    raise_all(ConfigError, faults, "the sections contradict each other")
    return "\n".join(parts)


def known_names(sections: Iterable[type[Section]]) -> dict[str, str]:
    """Map every name under which a knob of these sections is accepted to the knob's key; a key beats other names."""
    sections = tuple(sections)
    names = {name: key for section in sections for key in section.model_fields for name in other_names(section, key)}
    return names | {key: key for section in sections for key in section.model_fields}


def _read_source(source: Source) -> list[Entry]:
    if source is None:
        return []
    if isinstance(source, Mapping):
        return [Entry(name, value, "") for name, value in source.items()]
    if isinstance(source, str | os.PathLike):
        return read_mapping(Path(source))
    raise ConfigError(f"a configuration is a YAML file or a mapping, not {type(source).__name__}")


def _resolve(
    entries: Iterable[Entry], keys: Mapping[str, str], meanings: Switches, faults: list[str]
) -> dict[str, Given]:
    """Translate given names to keys, and switches to values; note unknown names and knobs given twice."""
    given: dict[str, Given] = {}
    named = [(entry.name.replace("-", "_") if isinstance(entry.name, str) else entry.name, entry) for entry in entries]
    # A switch that is off says something only where nothing else is said about its knob, so those come last.
    for name, entry in sorted(named, key=lambda pair: pair[0] in meanings and pair[1].value is False):
        if name in meanings and (entry.value is None or (entry.value is False and keys[name] in given)):
            continue
        if name not in keys:
            faults.append(f"unknown key {entry.name!r}{entry.place}{_hint(name, entry.value, keys)}")
        elif (key := keys[name]) in given:
            first = given[key]
            faults.append(
                f"{key} is given twice: {first.name!r}{first.place} and {entry.name!r}{entry.place}; keep one"
            )
        else:
            value = os.fspath(entry.value) if isinstance(entry.value, os.PathLike) else entry.value
            if name in meanings:
                if not isinstance(value, bool):
                    faults.append(f"{entry.name} = {value!r}{entry.place}: should be true or false")
                    continue
                value = meanings[name][not value]
            given[key] = Given(entry.name, value, entry.place)
    return given


def _hint(name: Any, value: Any, keys: Mapping[str, str]) -> str:
    nested = [key for key in value if isinstance(key, str) and key in keys] if isinstance(value, Mapping) else []
    if nested:
        return f"; keys are flat: move {', '.join(nested)} to the top level"
    return did_you_mean(name, keys) if isinstance(name, str) else "; keys are words"


def _fill(section: type[Section], given: Mapping[str, Given], faults: list[str]) -> Section | None:
    own = {key: given[key] for key in section.model_fields if key in given}
    wrong = {key for key, item in own.items() if isinstance(item.value, bool) and _is_number(section, key)}
    faults += [f"{own[key].name} = {own[key].value}{own[key].place}: should be a number" for key in sorted(wrong)]
    try:
        return section(**{key: item.value for key, item in own.items()})
    except ValidationError as error:
        by_key: dict[Any, list[Any]] = {}
        for detail in error.errors():
            by_key.setdefault(detail["loc"][0] if detail["loc"] else None, []).append(detail)
        new = (_describe(section, key, details, own) for key, details in by_key.items() if key not in wrong)
        # A knob that two sections share is wrong once.
        faults.extend(fault for fault in new if fault not in faults)
    return None


def _is_number(section: type[Section], key: str) -> bool:
    """True where a number is wanted; pydantic would take ``true`` for 1 there."""
    annotation = section.model_fields[key].annotation
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


def _describe(section: type[Section], key: Any, details: list[Any], own: Mapping[str, Given]) -> str:
    """One sentence: name, value, place, what is wrong, and the nearest choice where there are choices."""
    if details[0]["type"] == "missing":
        names = " or ".join([key, *other_names(section, key)])
        return f"{names} is required: {section.model_fields[key].description}"
    messages = []
    for detail in details:
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        inner = ".".join(str(part) for part in detail["loc"][1:] if not _is_type_name(part))
        messages.append(f"{inner}: {message}" if inner else message)
    what = " or ".join(dict.fromkeys(messages))
    if key not in own:
        return what
    item = own[key]
    choices = [str(choice) for choice in get_args(section.model_fields[key].annotation)]
    near = did_you_mean(item.value, choices) if isinstance(item.value, str) else ""
    return f"{item.name} = {item.value!r}{item.place}: {what}{near}"


def _is_type_name(part: str | int) -> bool:
    """True for the parts that pydantic adds to a location to name the branch of a union."""
    return isinstance(part, str) and part.partition("[")[0] in {"str", "bool", "int", "float", "list", "dict"}
