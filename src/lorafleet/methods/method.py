"""One way to train a base: its kind, its own settings, its training knobs; and how it gets onto a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, cast

from peft import PeftConfig
from transformers import PreTrainedModel

from lorafleet.config.bottleneck import BottleneckConfig
from lorafleet.config.knob import Section
from lorafleet.config.load import known_names, load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import VARIANTS, MethodSpec
from lorafleet.config.training import TrainingConfig
from lorafleet.errors import ConfigError, did_you_mean, faults_of, raise_all
from lorafleet.lora import Slots, inject_lora
from lorafleet.methods.bitfit import BiasSlots
from lorafleet.methods.bottleneck import BottleneckAdapter
from lorafleet.methods.full import FullModel
from lorafleet.methods.peft_method import PeftMethod
from lorafleet.methods.peft_options import REFUSED, SHORT, peft_config, peft_types

OWN: dict[str, tuple[type[Section], ...]] = {
    "full": (),
    "lora": (LoraConfig,),
    "bottleneck": (BottleneckConfig,),
    "bitfit": (),
}
"""Methods that are not PEFT's, with the sections that hold their options."""

RATES = {
    "full": 2e-5,  # a tenth of LoRA's: Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"
    "bottleneck": 1e-4,  # Pfeiffer et al. 2021
    "bitfit": 1e-3,  # Ben Zaken et al. 2021
    "prefix_tuning": 1e-2,  # as in PEFT's examples, which like ours have no network before the prefix
    "prompt_tuning": 3e-2,  # as in PEFT's examples
    "p_tuning": 1e-3,  # as in PEFT's examples
    "ia3": 3e-3,  # Liu et al. 2022
    "vera": 4e-3,  # Kopiczko et al. 2024
}
"""Learning rates where none is given and LoRA's own does not suit."""


@dataclass(frozen=True)
class Method:
    """A method with everything that decides what it trains.

    Args:
        name: The words it was asked for with.
        kind: ``lora``, ``full``, ``bottleneck``, ``bitfit``, or PEFT's type in lower case.
        config: Its own settings; none where it has no options.
        training: Its training knobs.
        given: The options of its own that it was asked for with.
    """

    name: str
    kind: str
    config: LoraConfig | BottleneckConfig | PeftConfig | None
    training: TrainingConfig
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Kind and own options as ``--method`` takes them; training knobs are no part of it."""
        options = ",".join(f"{key}={json.dumps(value)}" for key, value in self.given.items())
        return f"{self.kind}:{options}" if options else self.kind

    @property
    def options(self) -> dict[str, Any]:
        """Its own settings in JSON's types."""
        if self.config is None:
            return {}
        if isinstance(self.config, Section):
            return self.config.model_dump(mode="json")
        return {key: _plain(value) for key, value in asdict(self.config).items() if key not in _UNSAVED}

    def start(self, model: PreTrainedModel, seed: int) -> Slots:
        """Put it on a model, in slot 0.

        Raises:
            ConfigError: Its targets match nothing, or PEFT cannot put it on this model.
            ModelError: The architecture cannot take it.
        """
        if self.kind == "full":
            return FullModel(model)
        if self.kind == "bitfit":
            return BiasSlots(model)
        if isinstance(self.config, LoraConfig):
            return inject_lora(model, self.config, seed=seed)
        if isinstance(self.config, BottleneckConfig):
            return BottleneckAdapter(model, self.config, seed)
        assert self.config is not None
        return PeftMethod(model, self.config, seed)


_UNSAVED = ("runtime_config", "auto_mapping", "peft_version")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set):
        return sorted(value)
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def methods() -> list[str]:
    """Every name that a method can have."""
    return sorted([*OWN, *VARIANTS, *peft_types()])


def find_methods(specs: Sequence[MethodSpec], lora: LoraConfig, training: TrainingConfig) -> list[Method]:
    """Check what was asked for.

    Args:
        specs: The methods.
        lora: Settings of LoRA that a spec does not name.
        training: Training knobs that a spec does not name.

    Raises:
        ConfigError: Methods are unknown, lack an option that is given, or refuse its value; all faults of all methods
            at once, with the nearest names.
    """
    found, faults = list[Method](), list[str]()
    for spec in specs:
        try:
            found.append(_find(spec, lora, training))
        except ConfigError as error:
            faults += [f"method {spec.name}: {fault}" for fault in faults_of(error)]
    raise_all(ConfigError, faults, "the methods cannot be trained")
    return found


def _find(spec: MethodSpec, lora: LoraConfig, training: TrainingConfig) -> Method:
    kind = SHORT.get(spec.kind, spec.kind)
    own = OWN.get(kind)
    if own is None and kind in REFUSED:
        raise ConfigError(REFUSED[kind])
    if own is None and spec.kind not in (names := methods()):
        raise ConfigError(f"there is no such method{did_you_mean(spec.kind, names)}; there are {', '.join(names)}")
    given = training.model_dump(exclude_unset=True)
    if "learning_rate" not in given and kind in RATES:
        given["learning_rate"] = RATES[kind]
    if kind != "lora":
        given.pop("loraplus_lr_ratio", None)  # of A and B, which no other method has
    training_names = known_names((TrainingConfig,))
    of_training = {key: value for key, value in spec.options.items() if key in training_names}
    others = {key: value for key, value in spec.options.items() if key not in training_names}
    if own is None:
        (mine,) = load_sections((TrainingConfig,), given, of_training)
        return Method(spec.name, kind, peft_config(kind, others), mine, others)
    if LoraConfig in own:
        given |= lora.model_dump(exclude_unset=True)
    *config, knobs = load_sections((*own, TrainingConfig), given, spec.options)
    own_config = cast("LoraConfig | BottleneckConfig | None", config[0] if config else None)
    return Method(spec.name, kind, own_config, cast(TrainingConfig, knobs), others)
