"""The knobs of a search."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from lorafleet.config.knob import Section, knob
from lorafleet.config.training import ValidationConfig
from lorafleet.config.yaml_text import parse_scalar


class SearchConfig(Section):
    """What is searched, how, and what counts as better."""

    beside = (ValidationConfig,)
    space: str | dict[str, Any] = knob(
        "recommended",
        "What to try: recommended, classic (r × alpha), wide, or a mapping of knobs to values: [1e-4, 3e-4], "
        "{log: [1e-5, 1e-3]}, {range: [4, 64], step: 4}.",
    )
    sampler: Literal["auto", "grid", "random", "tpe", "cmaes", "nsga2"] = knob(
        "auto", "Who chooses the next trial (Optuna's). auto: grid where n_trials covers all combinations, else tpe."
    )
    n_trials: int | None = knob(
        None, "Settings to try. All combinations where they can be counted, else 20.", names=("trials",), ge=1
    )
    objective: str | list[str] = knob(
        "loss",
        "What to improve on held-out rows: loss, perplexity, accuracy, macro_f1, exact_match, bleu, chrf, rouge_l; or "
        "several, with parameters or latency (of decoding, × the base's) among them.",
        names=("metric",),
    )
    seeds_per_trial: int = knob(1, "Runs of each setting, with seeds that count up; their mean is its score.", ge=1)
    pruning: bool = knob(True, "Stop trials early that do worse than others at the same point (successive halving).")
    reduction_factor: int = knob(4, "Of the trials at a rung, one in this many goes on.", names=("eta",), ge=2)
    rungs: int = knob(2, "Points at which trials are compared: full budget / eta, / eta², …", ge=1)
    grace_period: float = knob(0.0, "Share of the full budget before which no trial is stopped.", ge=0, lt=1)
    keep_trials: bool = knob(False, "Keep every finished trial's adapter in trials/, not only the best one.")
    workers: int = knob(
        1, "Processes that share the trials, each with a base of its own. They need output_dir in common.", ge=1
    )
    backend: Literal["processes", "ray"] = knob(
        "processes", "Where workers run: processes of this machine, or tasks of the Ray cluster that it belongs to."
    )
    storage: str | None = knob(None, "Optuna storage URL; a SQLite file in output_dir when not given.")
    study_name: str | None = knob(None, "Name of the study in the storage; the output folder's name when not given.")

    @field_validator("space", mode="after")
    @classmethod
    def _mapping_as_text(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        """A flag carries text: ``--space '{r: [4, 8]}'``."""
        return parse_scalar(value) if isinstance(value, str) and value.lstrip().startswith("{") else value

    @field_validator("objective", mode="after")
    @classmethod
    def _some_objective(cls, value: str | list[str]) -> str | list[str]:
        if value == [] or (isinstance(value, list) and len(set(value)) != len(value)):
            raise ValueError("names each objective once, and at least one")
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @model_validator(mode="after")
    def _several_objectives_are_not_pruned(self) -> "SearchConfig":
        if isinstance(self.objective, list) and self.sampler == "cmaes":
            raise ValueError("sampler = cmaes improves one objective; use tpe, nsga2, random or grid for several")
        return self

    @property
    def objectives(self) -> list[str]:
        """All objectives."""
        return [self.objective] if isinstance(self.objective, str) else self.objective

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early; several objectives have no order to stop by."""
        return self.pruning and len(self.objectives) == 1
