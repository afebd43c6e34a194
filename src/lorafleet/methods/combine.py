"""``lorafleet adapters combine``: several LoRA adapters of one base as one, by PEFT's ``add_weighted_adapter``.

PEFT is given layers of the right names and shapes in place of the base, which takes no part in it.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from lorafleet.files.adapter_tensors import adapted_modules, factor_names, rank_and_alpha
from lorafleet.files.method import saved_kind
from lorafleet.registry.use import located

logger = logging.getLogger(__name__)

_SAME = ("base_weights_hash", "tokenizer_hash")


@dataclass(frozen=True)
class CombineResult:
    """Adapters that became one.

    Attributes:
        adapter: The folder to load.
        combination: How.
        r: Its rank.
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
        ConfigError: Knobs are wrong, or the folder is not empty.
        AdapterError: An adapter is missing, no plain LoRA, of another base than the first, or the combination does not
            take them; lists all of them.
    """
    where, config = load_sections((RegistryConfig, CombineConfig), None, knobs)
    output = Path(config.output_dir).expanduser()
    weights = config.weights or [1 / len(adapters)] * len(adapters)
    _check(adapters, weights, output)
    folders = [Path(str(located(AdapterConfig(adapter=name), where).adapter)) for name in adapters]
    read = [_read(name, folder) for name, folder in zip(adapters, folders, strict=True)]
    _check_together(adapters, read)
    combined, tensors = _combined(read, weights, config)
    metadata = {key: read[0].metadata[key] for key in _SAME if key in read[0].metadata}
    parts = dict(zip(adapters, weights, strict=True))
    save_adapter(
        output,
        combined,
        tensors,
        base_name=read[0].base_name or "",
        base_revision=read[0].base_revision,
        metadata=metadata | {"combination": config.combination, "parts": parts},
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
    if output.exists() and any(output.iterdir()):
        faults.append(f"output_dir {output} is not empty")
    raise_all(ConfigError, faults, "the adapters cannot be combined")


def _read(name: str, folder: Path) -> Adapter:
    if (kind := saved_kind(folder)) != "lora":
        raise AdapterError(f"{name} is {kind}; only LoRA adapters can be combined")
    return load_adapter(folder)


def _check_together(names: Sequence[str], adapters: Sequence[Adapter]) -> None:
    faults = []
    first = adapters[0]
    for name, adapter in zip(names, adapters, strict=True):
        config = adapter.config
        if config.use_dora or config.bias != "none" or config.modules_to_save:
            faults.append(f"{name} has more than A and B (DoRA, biases or whole modules), which do not combine")
        for key in _SAME:
            own, other = adapter.metadata.get(key), first.metadata.get(key)
            if own is not None and other is not None and own != other:
                faults.append(f"{name} has another {key} ({own[:12]}…) than {names[0]} ({other[:12]}…)")
    raise_all(AdapterError, faults, "the adapters cannot be combined")


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
        set_peft_model_state_dict(model, adapter.tensors, adapter_name=name)
    options: dict[str, Any] = {"svd_rank": config.rank} if config.combination.endswith("svd") else {}
    if config.combination.startswith(("ties", "dare", "magnitude")):
        options["density"] = config.density
    if "ties" in config.combination:
        options["majority_sign_method"] = config.majority_sign_method
    torch.manual_seed(config.seed)  # DARE drops numbers at random
    try:
        model.base_model.add_weighted_adapter(names, list(weights), "combined", config.combination, **options)
    except ValueError as error:
        raise AdapterError(f"{config.combination} does not take these adapters: {error}") from error
    found = {
        name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model, adapter_name="combined").items()
    }
    own = model.peft_config["combined"]
    return LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=sorted(own.target_modules)), found


def _skeleton(adapters: Sequence[Adapter]) -> nn.Module:
    """Linear layers of the names and shapes that the adapters adapt; their weights take no memory."""
    root = nn.Module()
    for adapter in adapters:
        for path in adapted_modules(adapter.tensors):
            name_A, name_B = factor_names(path, adapter.tensors)
            if "embedding" in name_A:
                raise AdapterError(f"{path} is an embedding, whose adapters do not combine here")
            features, out = adapter.tensors[name_A].shape[1], adapter.tensors[name_B].shape[0]
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
