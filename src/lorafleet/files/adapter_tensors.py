"""The names and shapes of an adapter's tensors, as PEFT writes them, checked against its config."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.lora.targets import PREFIX, in_saved, pattern_value

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?[AB](?(embedding)|\.weight)")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector")
_COPY = re.compile(r"(?P<module>.+)\.(original_module|modules_to_save)\.(?P<parameter>[^.]+)")
_SHOWN = 20


@lru_cache(maxsize=1 << 16)
def _factor_of(name: str) -> str | None:
    """The module whose A or B a tensor is."""
    found = _FACTOR.fullmatch(name)
    return None if found is None else found["module"]


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The modules that have an ``A`` or ``B``, in the order of ``names``."""
    return list(dict.fromkeys(module for name in names if (module := _factor_of(name))))


def factor_names(module: str, names: Collection[str]) -> tuple[str, str]:
    """The names of a module's A and B among those of an adapter's tensors; an embedding's differ from the others'."""
    embedding = any(f"{PREFIX}{module}.lora_embedding_{factor}" in names for factor in "AB")
    a, b = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    return f"{PREFIX}{module}.lora_{a}", f"{PREFIX}{module}.lora_{b}"


def is_bases(config: LoraConfig, name: str) -> bool:
    """Whether a tensor is the base's own: PEFT writes those of an embedding or output head beside its A and B."""
    return name.endswith(".base_layer.weight") or (config.bias == "none" and name.endswith(".base_layer.bias"))


def saved_modules(names: Sequence[str], tensors: Iterable[str], *, letters: bool) -> list[str]:
    """The full paths of the modules that ``modules_to_save`` names, as far as they have tensors.

    Args:
        names: ``modules_to_save``.
        tensors: Names of the adapter's tensors.
        letters: Whether a path need only end in the letters of a name, which is PEFT's rule: to it ``norm`` also means
            ``input_layernorm``. Otherwise a name stands for whole parts of a path.

    Returns:
        The outermost module for each tensor, in the order of ``tensors``; then the names that have none.
    """
    dot = "" if letters else "."
    found, used = dict[str, None](), set[str]()
    for parts in (name.removeprefix(PREFIX).split(".") for name in tensors if not _FACTOR.fullmatch(name)):
        heads = [".".join(parts[:end]) for end in range(1, len(parts))]
        matches = [(head, name) for head in heads for name in names if (dot + head).endswith(dot + name)]
        found |= dict.fromkeys(head for head, _ in matches[:1])
        used |= {name for _, name in matches}
    return [*found, *(name for name in names if name not in used)]


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors sorted by name, numbers by value; without copies.

    safetensors returns them in another order each time. Copies are the second and third of a saved module's bias, which
    PEFT writes with ``bias="all"``.
    """
    kept = {}
    for name in sorted(tensors, key=_natural):
        copy = _COPY.fullmatch(name)
        if copy is None or f"{copy['module']}.{copy['parameter']}" not in tensors:
            kept[name] = tensors[name]
    return kept


@lru_cache(maxsize=1 << 16)  # adapters of one base have the same names
def _natural(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split("."))


def rank_and_alpha(config: LoraConfig, module: str) -> tuple[int, float]:
    """The rank and alpha of one module, patterns applied with PEFT's rule."""
    rank = int(pattern_value(config.rank_pattern, module, config.r))
    return rank, pattern_value(config.alpha_pattern, module, config.lora_alpha)


def tensor_faults(config: LoraConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, surplus, of the wrong shape, or not finite.

    Which modules must be there is the model's to say; this checks all that the file and its config say together.
    """
    modules = adapted_modules(tensors)
    faults = [] if modules else ["there is no lora_A or lora_B tensor in it"]
    for module in modules:
        faults += _pair_faults(config, module, tensors)
    rest = [name for name in tensors if not _factor_of(name)]
    faults += [f"surplus tensor {name}" for name in rest if not _is_wanted(config, name, modules)]
    for saved in config.modules_to_save:
        if not any(in_saved(saved, name.removeprefix(PREFIX)) for name in rest):
            faults.append(f"missing: modules_to_save names {saved!r}, but no tensor belongs to it")
    faults += [f"{name} holds NaN or infinity" for name, tensor in tensors.items() if not _is_finite(tensor)]
    if len(faults) > _SHOWN:
        faults = [*faults[:_SHOWN], f"and {len(faults) - _SHOWN} more of the same kinds"]
    return faults


def _pair_faults(config: LoraConfig, module: str, tensors: Mapping[str, Tensor]) -> list[str]:
    rank, _ = rank_and_alpha(config, module)
    names = dict(zip("AB", factor_names(module, tensors), strict=True))
    faults = [f"missing tensor {name}" for name in names.values() if name not in tensors]
    for factor, name in names.items():
        if name in tensors:
            shape = tuple(tensors[name].shape)
            if len(shape) != 2 or shape[0 if factor == "A" else 1] != rank:
                wanted = f"({rank}, in)" if factor == "A" else f"(out, {rank})"
                faults.append(f"{name} has shape {shape}; with rank {rank} it is {wanted}")
    if config.use_dora:
        name, out = f"{PREFIX}{module}.lora_magnitude_vector", len(tensors.get(names["B"], ()))
        if name not in tensors:
            faults.append(f"missing tensor {name}")
        elif tensors[name].shape != (out,):
            faults.append(f"{name} has shape {tuple(tensors[name].shape)}; it is ({out},)")
    return faults


def _is_wanted(config: LoraConfig, name: str, modules: list[str]) -> bool:
    """Whether a tensor that is neither A nor B is a magnitude, bias or saved module that the config asks for."""
    if not name.startswith(PREFIX):
        return False
    if config.use_dora and (found := _MAGNITUDE.fullmatch(name)):
        return found["module"] in modules
    path = name.removeprefix(PREFIX)
    if is_bases(config, name) and path.rpartition(".base_layer.")[0] in modules:  # compared when it is used
        return True
    if any(in_saved(saved, path) for saved in config.modules_to_save):
        return True
    if config.bias == "all":
        return path.endswith(".bias")
    return config.bias == "lora_only" and path.removesuffix(".base_layer.bias") in modules


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())  # a sum of large numbers can be infinite
