"""``lorafleet advise``: from a model and rows to settings that can be run, each with its reason."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.advice.cautions import NEXT, cautions
from lorafleet.advice.facts import Facts, gather
from lorafleet.advice.rules import Choice, decide
from lorafleet.config.advice import AdviseConfig
from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import TrainingConfig, ValidationConfig
from lorafleet.config.yaml_text import dump_mapping

SECTIONS = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, ValidationConfig, AdviseConfig)


@dataclass(frozen=True)
class Advice:
    """Settings for a run, and why.

    Attributes:
        goal: What they are to be good for.
        facts: What they go by.
        given: Knobs that the user has set; they stay.
        choices: The others, in the order in which they were decided.
        output_dir: Where the run is to go.
        cautions: What to look at before training.
        next: What to try when the run overfits, underfits, jumps.
    """

    goal: str
    facts: Facts
    given: Mapping[str, Any]
    choices: tuple[Choice, ...]
    output_dir: str
    cautions: tuple[str, ...]
    next: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The knobs, as ``lorafleet.train`` takes them."""
        return {**self.given, **{one.knob: one.value for one in self.choices}, "output_dir": self.output_dir}

    @property
    def yaml(self) -> str:
        """The same as a file for ``lorafleet train``, with reasons as comments."""
        facts = self.facts
        lines = [
            f"# {facts.rows:,} rows of {facts.mean_tokens:.0f} tokens ({facts.longest} at most), task {facts.task}; "
            f"{facts.parameters:,} parameters on {facts.device}; goal: {self.goal}",
            *(f"# caution: {one}" for one in self.cautions),
            dump_mapping({**self.given, "output_dir": self.output_dir}).rstrip(),
        ]
        for one in self.choices:
            lines.append(f"{dump_mapping({one.knob: one.value}).rstrip()}  # {one.reason} ({one.source})")
        return "\n".join([*lines, *(f"# if it {one}" for one in self.next)]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types, with the settings."""
        return asdict(self) | {"config": self.config}


def advise(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> Advice:
    """Choose settings for a model and rows.

    Args:
        config: A YAML file, or a mapping of knobs; those that are set stay as they are.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are wrong, or do not fit the model.
        DataError: The rows cannot be read, or there are none to train on.
        ModelError: There is no such model.
    """
    model, data, lora, training, validation, own = load_sections(SECTIONS, config, knobs)
    facts = gather(model, data, lora)
    given: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for section in (model, data, lora, training, validation):
        given |= section.model_dump(mode="json", exclude_unset=True)
        defaults |= section.model_dump(mode="json")
    path = Path(data.data).resolve()  # of a folder named by dots, too
    name = path.name.removesuffix(path.suffix).replace(":", "-")
    return Advice(
        goal=own.goal,
        facts=facts,
        given=given,
        choices=tuple(decide(facts, own.goal, given, defaults)),
        output_dir=f"runs/{name}",
        cautions=tuple(cautions(facts, own.goal)),
        next=NEXT,
    )
