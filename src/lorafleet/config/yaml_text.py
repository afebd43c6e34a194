"""One flat YAML mapping, read with line numbers and written so that it reads back equal.

YAML 1.2's core schema decides what a plain word is: ``no`` is a word and not false, ``1e-4`` is a number,
``2024-01-01`` is a word. PyYAML's own resolver follows YAML 1.1, which surprises on each of these.
"""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lorafleet.errors import ConfigError, did_you_mean, raise_all

LARGEST_FILE = 1 << 20  # bytes; a larger file is a model or a data set given by mistake

_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class Entry(NamedTuple):
    """One key of a mapping: its name, its value, and a phrase that says where it stands (``" in x.yml, line 3"``)."""

    name: Any
    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML copies it on the first addition)

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self.twice: list[str] = []  # keys that stand twice in one mapping, and where

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                place = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
                self.twice.append(f"{place}: key {key.value!r} is already on line {lines[key.value]}; keep one")
            lines.setdefault(key.value, key.start_mark.line + 1)
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML copies it on the first addition)


def _float(text: str) -> float:
    return float(text.replace(".", "") if text[-1] in "fFnN" else text)  # .inf and .nan


for _tag, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        first = [*_first.replace("\0", ""), *([""] if "\0" in _first else [])]
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value, 16 if "x" in node.value else 10))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _float(node.value))


def read_mapping(path: Path, faults: list[str] | None = None) -> list[Entry]:
    """Read a YAML (or JSON) file that holds one mapping.

    Args:
        path: The file.
        faults: Takes keys that stand twice, to be told with what else is wrong; the last of each is read.

    Raises:
        ConfigError: The file is missing, no text, no valid YAML (with line and column), or holds no mapping; where
            ``faults`` are not given, keys stand twice.
    """
    content = _read_bytes(path)
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1
            raise ConfigError(f"{path}, line {line}: expected lines of the form 'key: value'")
        values = loader.construct_document(node)
        lines = {loader.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path} is not a YAML text: {error.reason} (position {error.position:,})") from error
    except ConfigError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply; keys are flat") from error
    twice = [f"{path}, {fault}" for fault in loader.twice]
    if faults is None:
        raise_all(ConfigError, twice, f"{path} cannot be read")
    else:
        faults += twice
    return [Entry(name, value, f" in {path}, line {lines[name]}") for name, value in values.items()]


def parse_scalar(text: str) -> Any:
    """Parse the text of one flag as YAML.

    Raises:
        ValueError: It is not valid YAML.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{text!r} is not valid YAML") from error
    if loader.twice:
        raise ValueError(f"{text!r} is not valid YAML: {loader.twice[0]}")
    return value


def dump_mapping(values: Mapping[str, Any]) -> str:
    """Write a mapping as YAML; ``read_mapping`` gives equal values back."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; give the YAML file in it")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"{path} has {size:,} bytes; a configuration is a text of at most {LARGEST_FILE:,}")
        return path.read_bytes()
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"configuration file {path} does not exist{did_you_mean(path.name, siblings)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
