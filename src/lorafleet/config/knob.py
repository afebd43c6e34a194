"""How a knob is declared: a typed pydantic field with its unit, its reason and its other names."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of knobs. Unknown keys are errors; a section never changes after it was made.

    Attributes:
        beside: Sections whose knobs may stand in the same file and mean nothing here: one file serves several commands.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    beside: ClassVar[tuple[type["Section"], ...]] = ()


Switches = Mapping[str, tuple[Any, Any]]


def knob(
    default: Any, description: str, *, names: tuple[str, ...] = (), switches: Switches | None = None, **limits: Any
) -> Any:
    """Declare a knob.

    Args:
        default: The value when neither the YAML file nor a flag gives one; ``...`` makes the knob required.
        description: What it does, its unit, and why the default is what it is. Shown by ``--help``.
        names: Names that other tools use for it; accepted in YAML and as flags.
        switches: Where other tools have true and false under another name: the two values that these stand for.
        limits: Pydantic's constraints (``ge``, ``gt``, ``le``, ``lt``).
    """
    extra: Any = {"names": names, "switches": switches or {}}
    return Field(default, description=description, json_schema_extra=extra, **limits)


def other_names(section: type[BaseModel], key: str) -> tuple[str, ...]:
    """The names besides ``key`` under which this knob is accepted."""
    extra = _extra(section, key)
    return (*extra["names"], *extra["switches"])


def switches(section: type[BaseModel], key: str) -> Switches:
    """Those of the other names that take true or false, and what these stand for."""
    return cast(Switches, _extra(section, key)["switches"])


def _extra(section: type[BaseModel], key: str) -> dict[str, Any]:
    return cast("dict[str, Any] | None", section.model_fields[key].json_schema_extra) or {"names": (), "switches": {}}
