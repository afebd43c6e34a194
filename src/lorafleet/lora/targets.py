"""Find the layers that an adapter adapts."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, ConfigError, did_you_mean, raise_all

PREFIX = "base_model.model."
"""What PEFT puts before a module's path in an adapter's file."""

SHORTHANDS = ("all-linear", "attention", "mlp")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every ``nn.Linear`` and ``Conv1D`` of a model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, and the embedding of the tokens where the model says which it is, by path.

    Other embeddings, as of positions, are looked up once for a whole batch: no routing tells whose rows they are.
    """
    get, tables = getattr(model, "get_input_embeddings", None), list[nn.Module]()
    with suppress(NotImplementedError):  # a model without any
        tables = [get()] if callable(get) else []
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or (isinstance(module, nn.Embedding) and module in tables)
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, where the model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def matches(name: str, path: str) -> bool:
    """Whether ``name`` is the module's path, a suffix of it at a dot, or a regex for all of it."""
    if path == name or path.endswith(f".{name}"):
        return True
    return not is_plain(name) and re.fullmatch(name, path) is not None


def is_plain(name: str) -> bool:
    """Whether a name has no character that only a regex would have."""
    return re.fullmatch(r"[\w.\-]+", name) is not None


def in_attention(path: str) -> bool:
    """Whether a layer belongs to an attention block, by the names that Hugging Face models use."""
    return any("attn" in part or "attention" in part for part in path.split("."))


def layer_index(path: str) -> int | None:
    """The number of the block a module stands in: the first number of its path."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", f".{path}")
    return int(found[1]) if found else None


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the end of ``path``, with PEFT's rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _wanted(config: LoraConfig) -> list[str]:
    """``target_modules`` as a list: commas separate plain names, anything else in one string is one regex."""
    targets = config.target_modules
    if isinstance(targets, list):
        return targets
    names = [name.strip() for name in targets.split(",")]
    return names if all(is_plain(name) for name in names) else [targets]


def _by_suffix(candidates: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """The paths that end in a name, for every name at a dot: a file may list hundreds of paths."""
    found: dict[str, set[str]] = {}
    for path in candidates:
        parts = path.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), set()).add(path)
    return found


def _select(
    name: str, candidates: dict[str, nn.Module], by_suffix: dict[str, set[str]], head: nn.Module | None
) -> set[str]:
    if name not in SHORTHANDS:
        return by_suffix.get(name, set()) if is_plain(name) else {path for path in candidates if matches(name, path)}
    body = {path for path, one in candidates.items() if one is not head and not isinstance(one, nn.Embedding)}
    if name == "all-linear":
        return body
    return {path for path in body if in_attention(path) == (name == "attention")}


def _suffixes(paths: dict[str, nn.Module]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the layers that ``config`` adapts, in the model's order.

    ``all-linear`` leaves the output head out, as PEFT does; the embedding of the tokens is adapted where its name, or a
    regex, asks for it. Works on the meta device.

    Args:
        model: Any model; layers are found by type, ``nn.Linear`` or GPT-2's ``Conv1D``, and the embedding by the model.
        config: Its ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``modules_to_save`` decide.

    Returns:
        The layers by their path in ``model``.

    Raises:
        AdapterError: The model carries LoRA layers already.
        ConfigError: A name matches no linear layer; the message lists the model's layers and the nearest name.
    """
    if any(type(module).__name__ == "LoraLinear" for module in model.modules()):
        raise AdapterError("this model carries a lorafleet bank already; use bank.add instead of injecting twice")
    candidates = adaptable_layers(model)
    head = output_head(model)
    suffixes, by_suffix = _suffixes(candidates), _by_suffix(candidates)
    faults, chosen = [], set[str]()
    for name in _wanted(config):
        found = _select(name, candidates, by_suffix, head)
        if not found:
            faults.append(
                f"target_modules: {name!r} matches no linear layer of {type(model).__name__}"
                f"{did_you_mean(name, [*suffixes, *SHORTHANDS])}; it could be {', '.join(suffixes) or 'nothing'}"
            )
        chosen |= found
    for name in config.exclude_modules:
        excluded = {path for path in candidates if matches(name, path)}
        if not excluded:
            faults.append(f"exclude_modules: {name!r} matches no linear layer{did_you_mean(name, suffixes)}")
        chosen -= excluded
    if config.layers_to_transform is not None:
        indices = {layer_index(path) for path in candidates} - {None}
        absent = sorted(set(config.layers_to_transform) - indices)
        if absent:
            faults.append(f"layers_to_transform: {absent} not among the model's {len(indices)} layers, counted from 0")
        chosen = {path for path in chosen if layer_index(path) in config.layers_to_transform}
    chosen = {path for path in chosen if not any(in_saved(name, path) for name in config.modules_to_save)}
    if not chosen and not faults:
        faults.append("target_modules, exclude_modules and layers_to_transform together leave no layer to adapt")
    for patterns, knob in ((config.rank_pattern, "rank_pattern"), (config.alpha_pattern, "alpha_pattern")):
        for pattern in patterns:
            if chosen and not any(re.match(rf"(.*\.)?({pattern})$", path) for path in chosen):
                faults.append(f"{knob}: {pattern!r} matches no adapted layer{did_you_mean(pattern, suffixes)}")
    if config.takes_off_start:
        faults += _start_faults(config, {path: layer for path, layer in candidates.items() if path in chosen})
    raise_all(ConfigError, faults, "the adapter does not fit the model")
    return {path: module for path, module in candidates.items() if path in chosen}


def _start_faults(config: LoraConfig, layers: Mapping[str, nn.Module]) -> list[str]:
    """Why W0 has no start of the rank that is asked for: one fault for each rank, with its smallest layer."""
    small: dict[int, list[tuple[int, str]]] = {}
    for path, layer in layers.items():
        rank, largest = int(pattern_value(config.rank_pattern, path, config.r)), min(cast(Tensor, layer.weight).shape)
        if rank > largest:
            small.setdefault(rank, []).append((largest, path))
    start = config.init_lora_weights
    return [
        f"init_lora_weights = {start} needs a rank of at most {min(found)[0]} for {min(found)[1]}, not {rank}; "
        f"{len(found)} layers are smaller than that rank"
        for rank, found in small.items()
    ]


def without_absent(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """``config`` without those of its ``target_modules`` that match no layer of ``model``, as PEFT reads it.

    A name that a user gives has to match, or it is a slip; a file's may have been written for a family of models. If
    no name matches at all, they stay, for :func:`find_targets` to refuse.
    """
    candidates, head = adaptable_layers(model), output_head(model)
    by_suffix = _by_suffix(candidates)
    targets = [name for name in _wanted(config) if _select(name, candidates, by_suffix, head)]
    return config.model_copy(update={"target_modules": targets}) if targets else config


def in_saved(name: str, path: str) -> bool:
    """Whether ``path`` is, or stands inside, a module that ``modules_to_save`` names."""
    return re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) is not None


def find_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the modules that ``modules_to_save`` names, by path; of a module and what is inside it, the module.

    Raises:
        ConfigError: A name matches no module; the message names the nearest.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    faults, chosen = [], {}
    for name in config.modules_to_save:
        found = {path: module for path, module in modules.items() if path == name or path.endswith(f".{name}")}
        if not found:
            leaves = sorted({path.rsplit(".", 1)[-1] for path in modules})
            faults.append(f"modules_to_save: {name!r} matches no module{did_you_mean(name, leaves)}")
        chosen.update(found)
    raise_all(ConfigError, faults, "the adapter does not fit the model")
    return {path: module for path, module in chosen.items() if not any(path.startswith(f"{o}.") for o in chosen)}
