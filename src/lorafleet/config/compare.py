"""The knobs of a comparison of methods, and of estimating what they need."""

from pydantic import field_validator

from lorafleet.config.knob import Section, knob
from lorafleet.config.method import MethodConfig
from lorafleet.config.training import RunConfig, ValidationConfig


class MethodsConfig(Section):
    """Which methods stand beside each other."""

    methods: str | list[str] = knob(
        "full,lora:r=8,lora:r=16,prefix,bottleneck", "What to compare, as --method of train takes it, with commas."
    )


class CompareConfig(Section):
    """How each method finds its learning rate, and what is measured."""

    tune_lr: bool = knob(
        True, "Let each method find its own learning rate first: full fine-tuning wants a tenth of LoRA's."
    )
    lr_steps: int | None = knob(
        None, "Steps of each run of that search; a fifth of the training's steps when not given.", ge=1
    )
    lr_runs: int = knob(
        3, "Rates tried, each about three times the one before; up to 4 more while the best is the first or last.", ge=2
    )
    small_rows: list[int] = knob(
        [32, 128], "Each method also trains on so few rows, for as many steps, to show how it overfits; 0 for none."
    )
    max_test_rows: int = knob(200, "Test rows that quality is measured on.", ge=2)
    new_tokens: int = knob(32, "Tokens generated where inference is timed.", ge=2)

    @field_validator("small_rows", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return [value] if isinstance(value, int) else value


class EstimateConfig(Section):
    """What is worked out besides training."""

    beside = (MethodConfig, ValidationConfig, RunConfig)
    tasks: int = knob(100, "Tasks or users that are to have an adapter, or a model, of their own.", ge=1)
