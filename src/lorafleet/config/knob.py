"""How a knob is declared: a typed pydantic field with its unit, its reason and its other names."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of knobs. Unknown keys are errors; a section never changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def knob(default: Any, description: str, *, names: tuple[str, ...] = (), **limits: Any) -> Any:
    """Declare a knob.

    Args:
        default: The value when neither the YAML file nor a flag gives one; ``...`` makes the knob required.
        description: What it does, its unit, and why the default is what it is. Shown by ``--help``.
        names: Names that other tools use for it; accepted in YAML and as flags.
        limits: Pydantic's constraints (``ge``, ``gt``, ``le``, ``lt``).
    """
    return Field(default, description=description, json_schema_extra={"names": list(names)}, **limits)


def other_names(section: type[BaseModel], key: str) -> tuple[str, ...]:
    """The names besides ``key`` under which this knob is accepted."""
    extra = section.model_fields[key].json_schema_extra
    return tuple(str(name) for name in extra.get("names", [])) if isinstance(extra, dict) else ()  # type: ignore[union-attr]
