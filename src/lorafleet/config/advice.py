"""The knobs of advice."""

from typing import Literal

from lorafleet.config.knob import Section, knob
from lorafleet.config.method import MethodConfig
from lorafleet.config.training import RunConfig


class AdviseConfig(Section):
    """What the settings are to be good for."""

    beside = (MethodConfig, RunConfig)
    goal: Literal["quality", "speed", "memory", "edge", "many_tasks"] = knob(
        "quality",
        "What matters most: quality, speed of training, memory in training, small devices (edge), or many adapters on "
        "one base (many_tasks).",
    )
