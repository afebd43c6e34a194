"""``adapter_config.json``: PEFT's fields to and from ``LoraConfig``."""

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from lorafleet.config.lora import LoraConfig
from lorafleet.files.adapter_tensors import adapted_modules, saved_modules

# Fields that change nothing about the adapter's mathematics here, whatever they hold.
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "peft_version"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
    *("corda_config", "eva_config", "lora_ga_config", "loftq_config"),
}
_READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "use_dora"),
}
# Starts that leave the base as it is. The others move the base's weights, which the adapter's file cannot undo.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def to_peft(
    config: LoraConfig, tensors: Collection[str], *, base_name: str, base_revision: str | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The config in PEFT's fields; only fields that every release of PEFT knows.

    Args:
        config: The adapter's config.
        tensors: Names of its tensors. The modules that have some are written by their full paths, and PEFT wraps these
            and no others; layers_to_transform and exclude_modules have done their work and are left out.
        base_name: Recorded as ``base_model_name_or_path``.
        base_revision: Recorded as ``revision``.
        fan_in_fan_out: Whether weights are stored ``(in, out)``.
    """
    return {
        "alpha_pattern": {name: _whole(alpha) for name, alpha in config.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": config.bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _whole(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": saved_modules(config.modules_to_save, tensors, letters=False) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": base_revision,
        "target_modules": adapted_modules(tensors),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def from_peft(fields: Mapping[str, Any], tensors: Collection[str]) -> tuple[LoraConfig | None, list[str]]:
    """Read PEFT's fields.

    Args:
        fields: ``adapter_config.json``.
        tensors: Names of the adapter's tensors. The modules they belong to stand in for selections that PEFT knows and
            lorafleet does not.

    Returns:
        The config, or ``None`` where there are faults; and all the faults.
    """
    faults, modules = _unsupported(fields), adapted_modules(tensors)
    values = {name: fields[name] for name in _READ & LoraConfig.model_fields.keys() if fields.get(name) is not None}
    values["init_lora_weights"] = "gaussian" if fields.get("init_lora_weights") == "gaussian" else "default"
    layers = fields.get("layers_to_transform")
    if isinstance(layers, int):
        values["layers_to_transform"] = [layers]
    if layers == []:
        values.pop("layers_to_transform", None)
    saved = fields.get("modules_to_save")
    if isinstance(saved, list) and all(isinstance(name, str) for name in saved):
        values["modules_to_save"] = saved_modules(saved, tensors, letters=True)
    if fields.get("target_modules") is None:
        faults.append("target_modules is missing")
    values.pop("exclude_modules", None)
    if fields.get("exclude_modules") or fields.get("layers_pattern"):
        values["target_modules"] = modules  # PEFT has selected; what it selected has tensors
        values.pop("layers_to_transform", None)
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(values.get(name), dict):
            with suppress(re.error):  # LoraConfig names the pattern
                values[name] = _used(values[name], modules)
    try:
        config = LoraConfig(**values)
    except ValidationError as error:
        faults += [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" if e["loc"] else e["msg"]
            for e in error.errors()
        ]
        return None, faults
    return (None if faults else config), faults


def _unsupported(fields: Mapping[str, Any]) -> list[str]:
    """Fields whose value asks for something other than plain LoRA on a causal language model."""
    faults = []
    kind = fields.get("peft_type")
    if kind != "LORA":
        faults.append(f"peft_type is {kind!r}; only LORA adapters are read")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(f"task_type is {fields['task_type']!r}; only CAUSAL_LM adapters are read")
    start = fields.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        faults.append(
            f"init_lora_weights is {start!r}, a start that moves the base's weights; save it as plain LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    # Fields that lorafleet does not know are harmless while they are off, as PEFT's newer options are by default.
    asked = {name: value for name, value in fields.items() if name not in _READ | _INERT and value}
    faults += [f"{name} is {value!r:.80}; lorafleet does not support it" for name, value in sorted(asked.items())]
    return faults


def _used(patterns: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """The patterns that decide for at least one module: PEFT allows others, which mean nothing."""
    deciding = {next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None) for module in modules}
    return {pattern: value for pattern, value in patterns.items() if pattern in deciding}


def _whole(value: float) -> float | int:
    """PEFT's alpha is an integer where it can be."""
    return int(value) if value == int(value) else value
