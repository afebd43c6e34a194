"""One flag for every knob: names, help and values come from the sections, nothing is declared twice.

A knob ``learning_rate`` with the other name ``lr`` becomes ``--learning-rate`` and the hidden ``--lr``; the context
turns underscores into dashes. What a flag carries is read as YAML where the knob is a number, a list or a mapping, and
validated once, by ``load_sections``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from lorafleet.config import Section, known_names, switches
from lorafleet.config.yaml_text import parse_scalar

FREE_TEXT = {"prompt"}  # commas and brackets in these are the user's own words

Kind = Literal["boolean", "optional", "list", "value"]


@dataclass(frozen=True)
class Flag:
    """A knob as the command line shows it.

    Attributes:
        key: Its name.
        others: Its other names.
        section: Where it is declared.
        field: Its declaration.
        kind: How it is typed.
        value: Its default in this command; ``...`` when it is required.
    """

    key: str
    others: tuple[str, ...]
    section: type[Section]
    field: FieldInfo
    kind: Kind
    value: Any

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.value is ...

    @property
    def spelling(self) -> str:
        """``--r INTEGER``, ``--overwrite / --no-overwrite``."""
        long = dashed(self.key)
        return f"--{long} / --no-{long}" if self.kind == "boolean" else f"--{long} {_metavar(self)}"

    @property
    def default(self) -> str:
        """The default as it would be typed, or an empty text where there is none."""
        value = self.value
        if self.required or value is None or value in ([], {}):
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else str(value)

    @property
    def help(self) -> str:
        """The description with the default or ``required``."""
        note = "required" if self.required else f"default: {self.default}" if self.default else ""
        return f"{self.field.description}{f'  [{note}]' if note else ''}"


def flags_of(
    sections: Sequence[type[Section]], leave_out: Iterable[str] = (), defaults: Mapping[str, Any] | None = None
) -> list[Flag]:
    """All flags of these sections in their order; a key that two sections share appears once.

    Args:
        sections: Where the knobs are declared.
        leave_out: Keys without a flag.
        defaults: Defaults of the command that differ from the declared ones.
    """
    keys = known_names(sections)
    done = set(leave_out)
    flags = []
    for section in sections:
        for key, field in section.model_fields.items():
            if key not in done:
                done.add(key)
                others = tuple(name for name, home in keys.items() if home == key and name != key)
                value = (defaults or {}).get(key, ... if field.is_required() else field.default)
                flags.append(Flag(key, others, section, field, _kind(field.annotation), value))
    return flags


def options_of(flags: Iterable[Flag]) -> Iterator[click.Option]:
    """Click's options: one for each name, the other names hidden."""
    for flag in flags:
        for name in (flag.key, *flag.others):
            yield _option(flag, name)


def given_knobs(context: click.Context, flags: Iterable[Flag]) -> dict[str, Any]:
    """The knobs that the command line gives, under the names used there."""
    knobs = {}
    for flag in flags:
        for name in (flag.key, *flag.others):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                value = context.params[name]
                knobs[name] = value if isinstance(value, bool) else _read(flag, value)
    return knobs


def dashed(name: str) -> str:
    """``learning_rate`` → ``learning-rate``."""
    return name.replace("_", "-")


def _option(flag: Flag, name: str) -> click.Option:
    long, hidden = dashed(name), name != flag.key
    if flag.kind == "boolean" or name in switches(flag.section, flag.key):
        return click.Option([name, f"--{long}/--no-{long}"], default=None, hidden=hidden)
    if flag.kind == "optional":
        return click.Option([name, f"--{long}"], is_flag=False, flag_value="true", hidden=hidden)
    return click.Option([name, f"--{long}"], multiple=flag.kind == "list", hidden=hidden)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _kind(annotation: Any) -> Kind:
    members = _members(annotation)
    if bool in members:
        return "optional" if str in members else "boolean"
    return "list" if any(get_origin(member) is list for member in members) else "value"


def _metavar(flag: Flag) -> str:
    names = [_type_name(member) for member in _members(flag.field.annotation) if member not in (type(None), bool)]
    # Of ``str | list[str]`` the list; a number or words are both shown.
    shown = "|".join(names) if names[0] == "INTEGER" else names[-1]
    return f"[{shown}]" if flag.kind == "optional" else shown


def _type_name(member: Any) -> str:
    if get_origin(member) is Literal:
        return "|".join(str(choice) for choice in get_args(member))
    if get_origin(member) is list:
        return f"{_type_name(get_args(member)[0])},…"
    if get_origin(member) is dict:
        return "YAML"
    return {int: "INTEGER", float: "NUMBER"}.get(member, "TEXT")


def _read(flag: Flag, given: Any) -> Any:
    """Turn the text of a flag, or the texts of a repeated one, into the value that YAML would hold."""
    members = _members(flag.field.annotation)
    if flag.kind != "list":
        return _read_value(members, given)
    values = list(given) if flag.key in FREE_TEXT else [_read_list(members, text) for text in given]
    if len(values) == 1:
        return values[0]
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _read_value(members: tuple[Any, ...], text: str) -> Any:
    if bool in members and text in ("true", "false"):
        return text == "true"
    if str in members or any(get_origin(member) is Literal for member in members):
        return text
    return _yaml_or_text(text)


def _read_list(members: tuple[Any, ...], text: str) -> Any:
    """``a,b`` and ``[a, b]`` are lists; where a text is accepted too (target_modules), a regex stays as it is."""
    value = _yaml_or_text(text) if text.startswith("[") else text
    if isinstance(value, list):
        return value
    if text == "null" and type(None) in members:
        return None
    parts = [part.strip() for part in text.split(",")]
    if str in members:
        return parts if len(parts) > 1 and all(part.replace(".", "_").isidentifier() for part in parts) else text
    return [part for part in parts if part]


def _yaml_or_text(text: str) -> Any:
    try:
        return parse_scalar(text)
    except ValueError:
        return text  # validation says what was expected instead
