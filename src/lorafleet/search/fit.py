"""Whether every trial of a space can be trained on this base, found out before anything is loaded."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from torch import nn

from lorafleet.config.knob import Section
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.errors import ConfigError, faults_of
from lorafleet.lora.layer import linear_shape
from lorafleet.lora.targets import adaptable_layers, find_targets, pattern_value
from lorafleet.search.space import SECTIONS, Space

SHAPE = ("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
"""Knobs that decide which layers an adapter has and how large it is."""


def configure(base: Sequence[Section], knobs: dict[str, Any]) -> tuple[LoraConfig, TrainingConfig]:
    """The two sections of a trial: the run's own with the trial's knobs in them."""
    own = {key: value for section in base for key, value in section.model_dump().items()}
    lora, training = load_sections(SECTIONS, own, knobs)
    return lora, training


def shapes(space: Space, base: Sequence[Section]) -> list[LoraConfig]:
    """Every shape that an adapter of this space can have, by the ends of its dimensions."""
    dimensions = [one for one in space.dimensions if set(one.knobs) & set(SHAPE)]
    found: list[LoraConfig] = []
    for values in product(*(one.domain.samples for one in dimensions)):
        knobs = space.settings({one.name: value for one, value in zip(dimensions, values, strict=True)})
        shape, _ = configure(base, {name: value for name, value in knobs.items() if name in SHAPE})
        if shape not in found:
            found.append(shape)
    return found


def fit_faults(model: nn.Module, configs: Sequence[LoraConfig]) -> list[str]:
    """Adapters without layers to adapt, or with a rank beyond what a layer can hold. The meta device suffices."""
    return list(dict.fromkeys(fault for config in configs for fault in _faults(model, config)))


def _faults(model: nn.Module, config: LoraConfig) -> Iterator[str]:
    try:
        targets = find_targets(model, config)
    except ConfigError as error:
        yield from faults_of(error)
        targets = adaptable_layers(model)  # the rank is checked against those that are there
    for path, layer in targets.items():
        rank, largest = int(pattern_value(config.rank_pattern, path, config.r)), min(linear_shape(layer))
        if rank > largest:
            yield f"r = {rank} is more than {path} can hold: its smaller side is {largest}"
            return
