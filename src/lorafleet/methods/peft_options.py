"""PEFT's methods by their type, with their options checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PromptLearningConfig

from lorafleet.errors import ConfigError, did_you_mean, raise_all

SHORT = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}
"""Short names of PEFT's types."""

REFUSED = {
    "lora": "lorafleet's own lora is meant by that; give its options there",
    "adalora": "it moves ranks between layers in a training loop of its own",
    "xlora": "it mixes adapters that are trained already",
    "poly": "it needs a task's number with every row",
    "multitask_prompt_tuning": "it needs a task's number with every row",
    "cpt": "it needs the types of its context's tokens with every row",
    "adaption_prompt": "it replaces attention itself, for Llama and Mistral alone",
}
"""PEFT's types that cannot be trained here, and why."""

VIRTUAL_TOKENS = 20
"""Virtual tokens of a method that prepends some, where nobody says how many."""

# Fields that are PEFT's own book-keeping.
_NOT_OPTIONS = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_NOT_OPTIONS |= {"inference_mode", "runtime_config"}


def peft_types() -> list[str]:
    """The types that can be trained here, by PEFT's names in lower case and the short ones."""
    types = [str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    return sorted([*SHORT, *(kind for kind in types if kind not in REFUSED)])


def peft_config(kind: str, options: Mapping[str, Any]) -> PeftConfig:
    """PEFT's config of a method for causal language models.

    Args:
        kind: PEFT's type in any case (``ia3``, ``prefix_tuning``), or a short name (``prefix``).
        options: Fields of that type's config.

    Raises:
        ConfigError: The type is unknown or cannot be trained here, it has no such option, or PEFT refuses a value; all
            faults at once, with the nearest names.
    """
    name = SHORT.get(kind.lower(), kind.lower())
    if name in REFUSED:
        raise ConfigError(f"method {kind}: {REFUSED[name]}")
    configs = {str(getattr(key, "value", key)).lower(): config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in configs:
        types = peft_types()
        raise ConfigError(f"method {kind!r} is unknown to PEFT{did_you_mean(kind, types)}; it has {', '.join(types)}")
    known = sorted({field.name for field in fields(configs[name])} - _NOT_OPTIONS)
    if issubclass(configs[name], PromptLearningConfig):
        options = {"num_virtual_tokens": VIRTUAL_TOKENS, **options}
    faults = [
        f"{option} is no option of {kind}{did_you_mean(option, known)}; it has {', '.join(known)}"
        for option in options
        if option not in known
    ]
    raise_all(ConfigError, faults, f"method {kind}")
    try:
        return configs[name](task_type="CAUSAL_LM", **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {kind}: PEFT refuses its options: {error}") from error


def config_of_file(kind: str, values: Mapping[str, Any]) -> PeftConfig:
    """PEFT's config from the contents of ``adapter_config.json``; what is not an option of the type is left out.

    Raises:
        ConfigError: The type cannot be used here.
    """
    known = {field.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in fields(config)} - _NOT_OPTIONS
    options = {key: value for key, value in values.items() if key in known and value is not None}
    return peft_config(kind, options)


def prepends(config: object) -> bool:
    """Whether the method puts virtual tokens before each row, so that its batches are padded."""
    return isinstance(config, PromptLearningConfig)
