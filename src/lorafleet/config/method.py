"""What is to be trained, in words: ``lora:r=8``, ``full:learning_rate=1e-5``, ``prefix:num_virtual_tokens=20``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lorafleet.config.knob import Section, knob
from lorafleet.config.yaml_text import parse_scalar
from lorafleet.errors import ConfigError, raise_all

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loraplus": {"loraplus_lr_ratio": 16.0},
}
"""Names for LoRA with one option."""


class MethodConfig(Section):
    """Which weights are trained."""

    method: str = knob(
        "lora",
        "What trains: lora (or dora, pissa, olora, rslora, loraplus), full (all weights), bottleneck, bitfit, prefix, "
        "prompt, p_tuning, ia3, vera, oft, … Options follow a colon: prefix:num_virtual_tokens=20.",
    )


class MethodSpec(NamedTuple):
    """A method as it was asked for.

    Args:
        name: The words, which name it in tables.
        kind: ``lora``, ``full``, ``bottleneck``, ``bitfit``, or one of PEFT's types.
        options: Its own options, and knobs of training for it alone.
    """

    name: str
    kind: str
    options: dict[str, Any]


def parse_methods(text: str | Sequence[str]) -> list[MethodSpec]:
    """Read methods that commas or list items separate: ``full,lora:r=8,lora_alpha=16,prefix``.

    A part with ``=`` and no colon before it goes on with the options of the method before it.

    Raises:
        ConfigError: An option has no value or none to belong to, is given twice, or two methods are the same; all
            faults at once.
    """
    parts = [part for one in ([text] if isinstance(text, str) else text) for part in _split(one)]
    joined, faults = list[str](), list[str]()
    for part in parts:
        if "=" not in part.partition(":")[0]:
            joined.append(part)
        elif joined:
            joined[-1] += ("," if ":" in joined[-1] else ":") + part
        else:
            faults.append(f"method {part!r} begins with an option; its name comes first, as in lora:r=8")
    faults += [f"method {name!r} is named twice" for name in dict.fromkeys(joined) if joined.count(name) > 1]
    if not joined and not faults:
        faults.append("no method is named")
    specs = [_parse(one, faults) for one in joined]
    raise_all(ConfigError, faults, "the methods cannot be read")
    return specs


def _parse(text: str, faults: list[str]) -> MethodSpec:
    name, _, rest = text.partition(":")
    kind = name.strip().lower().replace("-", "_")
    options: dict[str, Any] = {}
    for part in _split(rest):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key or not value:
            faults.append(f"method {text!r}: {part!r} is no option; write name=value")
        elif (key := key.replace("-", "_")) in options:
            faults.append(f"method {text!r}: {key} is given twice")
        else:
            options[key] = _value(value, text, faults)
    if kind in VARIANTS:
        kind, options = "lora", VARIANTS[kind] | options
    return MethodSpec(text, kind, options)


def _value(text: str, method: str, faults: list[str]) -> Any:
    try:
        return parse_scalar(text)
    except ValueError as error:
        faults.append(f"method {method!r}: {text!r} cannot be read: {error}")
        return None


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
