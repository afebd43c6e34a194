"""``lorafleet adapters combine``: several LoRA adapters of one base as one, by PEFT's ``add_weighted_adapter``.

PEFT is given layers of the right names and shapes in place of the base, which takes no part in it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lorafleet.config.combine import CombineConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.use import AdapterConfig
from lorafleet.errors import AdapterError, ConfigError, raise_all
from lorafleet.files.adapter import Adapter, load_adapter, save_adapter
from lorafleet.files.adapter_tensors import adapted_modules, factor_names, is_bases, rank_and_alpha
from lorafleet.files.atomic import write_bytes
from lorafleet.files.manifest import read_file
from lorafleet.files.method import saved_kind
from lorafleet.files.run_folder import TEMPLATE
from lorafleet.registry.use import located

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SAME = ("base_weights_hash", "tokenizer_hash")


@dataclass(frozen=True)
class CombineResult:
    """Adapters that became one.

    Attributes:
        adapter: The folder to load.
        combination: How.
        r: Its rank; the largest, where layers differ.
        parameters: Its numbers.
        parts: The adapters, with their weights.
    """

    adapter: str
    combination: str
    r: int
    parameters: int
    parts: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def combine(adapters: Sequence[str], /, **knobs: Any) -> CombineResult:
    """Write one adapter that stands for several.

    Args:
        adapters: Folders, or names of the registry.
        knobs: Those of :class:`CombineConfig` and of the registry.

    Raises:
        ConfigError: Knobs are wrong, or the folder is a file or not empty.
        AdapterError: An adapter is missing, no plain LoRA, of another base than the others, or the combination does not
            take them; lists all of them.
    """
    where, config = load_sections((RegistryConfig, CombineConfig), None, knobs)
    output = Path(config.output_dir).expanduser()
    weights = config.weights or [1 / len(adapters) for _ in adapters]
    _check(adapters, weights, output)
    folders = [Path(str(located(AdapterConfig(adapter=name), where).adapter)) for name in adapters]
    read = [_read(name, folder) for name, folder in zip(adapters, folders, strict=True)]
    _check_together(adapters, read, config.combination)
    combined, tensors = _combined(read, weights, config)
    parts = dict(zip(adapters, weights, strict=True))
    metadata = _kept(adapters, read) | {"combination": config.combination, "parts": parts}
    templates = [read_file(folder, TEMPLATE) if (folder / TEMPLATE).is_file() else None for folder in folders]
    template = _agreed("chat template", adapters, templates)
    named = next((one for one in read if one.base_name), read[0])
    if template is not None:  # before the manifest, which says that all is there
        write_bytes(output / TEMPLATE, template)
    save_adapter(
        output,
        combined,
        tensors,
        base_name=named.base_name or "",
        base_revision=named.base_revision,
        metadata=metadata,
    )
    count = sum(tensor.numel() for tensor in tensors.values())
    return CombineResult(str(output), config.combination, combined.r, count, parts)


def _check(adapters: Sequence[str], weights: Sequence[float], output: Path) -> None:
    faults = []
    if len(adapters) < 2:
        faults.append(f"combining takes two adapters or more; got {len(adapters)}")
    if twice := sorted({name for name in adapters if adapters.count(name) > 1}):
        faults.append(f"adapters are named twice: {', '.join(twice)}; give one a larger weight")
    if len(weights) != len(adapters):
        faults.append(f"weights: {len(adapters)} adapters need as many; got {len(weights)}")
    if output.exists() and not output.is_dir():
        faults.append(f"output_dir {output} is a file")
    elif output.is_dir() and any(output.iterdir()):
        faults.append(f"output_dir {output} is not empty")
    raise_all(ConfigError, faults, "the adapters cannot be combined")


def _read(name: str, folder: Path) -> Adapter:
    if (kind := saved_kind(folder)) != "lora":
        raise AdapterError(f"{name} is {kind}; only LoRA adapters can be combined")
    return load_adapter(folder)


def _check_together(names: Sequence[str], adapters: Sequence[Adapter], combination: str) -> None:
    faults = []
    for name, adapter in zip(names, adapters, strict=True):
        config = adapter.config
        if config.use_dora or config.bias != "none" or config.modules_to_save:
            faults.append(f"{name} has more than A and B (DoRA, biases or whole modules), which do not combine")
    faults += _base_faults(names, adapters) + _layer_faults(names, adapters, combination)
    raise_all(AdapterError, faults, "the adapters cannot be combined")


def _base_faults(names: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """Adapters of another base by its hashes; by its name where an adapter has no hash of it, as PEFT writes them."""
    faults = []
    for key in _SAME:
        found = [(name, one.metadata[key]) for name, one in zip(names, adapters, strict=True) if one.metadata.get(key)]
        for name, own in found[1:]:
            first, other = found[0]
            if own != other:
                faults.append(f"{name} has another {key} ({own[:12]}…) than {first} ({other[:12]}…)")
    named = [
        (name, _place(one.base_name), bool(one.metadata.get(_SAME[0])))
        for name, one in zip(names, adapters, strict=True)
        if one.base_name
    ]
    named.sort(key=lambda one: not one[2])  # those whose base is known by its hash are the measure
    known = {base for _, base, hashed in named if hashed} or {base for _, base, _ in named[:1]}
    for name, base, hashed in named:
        if not hashed and base not in known:
            first, other, _ = named[0]
            faults.append(
                f"{name} has another base ({base}) than {first} ({other}); if they are one, write {other} as "
                f"base_model_name_or_path in the adapter_config.json of {name}"
            )
    return faults


def _place(base_name: str) -> str:
    """A base's name; of a folder here its full path, for PEFT writes the path that it was given."""
    path = Path(base_name).expanduser()
    return str(path.resolve()) if path.exists() else base_name


def _layer_faults(names: Sequence[str], adapters: Sequence[Adapter], combination: str) -> list[str]:
    """For each adapter the first layer that does not fit those before it, and how many there are."""
    any_rank = combination == "cat" or combination.endswith("svd")
    faults, seen = [], dict[str, tuple[str, int, tuple[int, int]]]()
    for name, adapter in zip(names, adapters, strict=True):
        sizes, ranks = [], []
        for path in adapted_modules(adapter.tensors):
            rank, size = _shape(adapter, path)
            first, its_rank, its_size = seen.setdefault(path, (name, rank, size))
            if size != its_size:
                sizes.append(f"{path} of {name} has (in, out) = {size}, that of {first} {its_size}")
            elif rank != its_rank and not any_rank:
                ranks.append(f"{path} of {name} has {rank}, that of {first} {its_rank}")
        if sizes:
            faults.append(f"{sizes[0]}: they are not of one base; layers that differ: {len(sizes)}")
        if ranks:
            faults.append(
                f"{combination} needs the same r in each layer: {ranks[0]}; layers that differ: {len(ranks)}; cat and "
                "svd take any r"
            )
    return faults


def _shape(adapter: Adapter, path: str) -> tuple[int, tuple[int, int]]:
    """A layer's rank, and its (in, out)."""
    name_A, name_B = factor_names(path, adapter.tensors)
    (rank, features), out = adapter.tensors[name_A].shape, adapter.tensors[name_B].shape[0]
    return rank, (features, out)


def _kept(names: Sequence[str], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the adapters know of their base, and how all of them are asked."""
    kept: dict[str, Any] = {}
    for key in _SAME:
        if found := [one.metadata[key] for one in adapters if one.metadata.get(key)]:
            kept[key] = found[0]
    prompts = [one.metadata.get("data", {}).get("system_prompt") for one in adapters]
    if (prompt := _agreed("system prompt", names, prompts)) is not None:
        kept["data"] = {"system_prompt": prompt}
    return kept


def _agreed(what: str, names: Sequence[str], values: Sequence[T]) -> T | None:
    """The value that all adapters have; none, and a warning, where they differ."""
    if others := [name for name, value in zip(names, values, strict=True) if value != values[0]]:
        logger.warning(
            "%s: another %s than that of %s; the combined adapter has none, so give one when it is asked",
            ", ".join(others),
            what,
            names[0],
        )
        return None
    return values[0]


def _combined(
    adapters: Sequence[Adapter], weights: Sequence[float], config: CombineConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The combination's config and tensors, by PEFT."""
    skeleton = _skeleton(adapters)
    names = [f"part{number}" for number in range(len(adapters))]
    model: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        peft_config = _peft_config(adapter)
        if model is None:
            model = peft.PeftModel(skeleton, peft_config, adapter_name=name)
        else:
            model.add_adapter(name, peft_config)
        factors = {key: tensor for key, tensor in adapter.tensors.items() if not is_bases(adapter.config, key)}
        set_peft_model_state_dict(model, factors, adapter_name=name)
    options: dict[str, Any] = {}
    if config.combination.endswith("svd"):  # no layer has a rank above its smaller side, which the full matrices ignore
        options |= {"svd_rank": config.rank, "svd_full_matrices": False}
    if config.combination.startswith(("ties", "dare", "magnitude")):
        options["density"] = config.density
    if "ties" in config.combination:
        options["majority_sign_method"] = config.majority_sign_method
    torch.manual_seed(config.seed)  # DARE drops numbers at random
    try:
        model.base_model.add_weighted_adapter(names, list(weights), "combined", config.combination, **options)
    except (ValueError, RuntimeError) as error:  # torch's own: no memory, a decomposition that does not converge
        raise AdapterError(f"{config.combination} does not take these adapters: {error}") from error
    found = get_peft_model_state_dict(model, adapter_name="combined", save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    return _lora_config(tensors), tensors


def _lora_config(tensors: Mapping[str, torch.Tensor]) -> LoraConfig:
    """The ranks that the tensors have; each alpha is the rank, for PEFT has put the scales into the tensors."""
    ranks = {path: tensors[factor_names(path, tensors)[0]].shape[0] for path in adapted_modules(tensors)}
    largest = max(ranks.values())
    smaller = {path: rank for path, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        rank_pattern=smaller,
        alpha_pattern={path: float(rank) for path, rank in smaller.items()},
    )


def _skeleton(adapters: Sequence[Adapter]) -> nn.Module:
    """Linear layers of the names and shapes that the adapters adapt; their weights take no memory."""
    root = nn.Module()
    for adapter in adapters:
        for path in adapted_modules(adapter.tensors):
            if "embedding" in factor_names(path, adapter.tensors)[0]:
                raise AdapterError(f"{path} is an embedding, whose adapters do not combine here")
            _, (features, out) = _shape(adapter, path)
            parent = root
            *parents, last = path.split(".")
            for part in parents:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if not hasattr(parent, last):
                layer = nn.Linear(1, 1, bias=False)
                layer.in_features, layer.out_features = features, out
                layer.weight = nn.Parameter(torch.zeros(()).expand(out, features), requires_grad=False)
                parent.add_module(last, layer)
    return root


def _peft_config(adapter: Adapter) -> peft.LoraConfig:
    """The adapter's config with rsLoRA's scale as an alpha, for PEFT keeps the first one's rule for the result."""
    modules = adapted_modules(adapter.tensors)
    ranks, alphas = {}, {}
    for path in modules:
        rank, alpha = rank_and_alpha(adapter.config, path)
        ranks[path], alphas[path] = rank, adapter.config.scaling(rank, alpha) * rank
    largest = max(ranks.values())
    usual = next(alphas[path] for path, rank in ranks.items() if rank == largest)
    return peft.LoraConfig(
        r=largest,
        lora_alpha=usual,
        target_modules=modules,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != largest},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != usual},
        init_lora_weights=False,
    )
