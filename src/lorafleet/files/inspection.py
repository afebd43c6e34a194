"""``lorafleet inspect``: what an adapter or a model is made of, from headers and configs alone."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.errors import ConfigError
from lorafleet.files.adapter import CONFIG, Adapter, load_adapter
from lorafleet.files.adapter_tensors import adapted_modules, factor_names, is_bases, rank_and_alpha
from lorafleet.files.deployability import deployability, vllm_rank_flag
from lorafleet.lora.layer import linear_shape
from lorafleet.lora.targets import find_saved, find_targets, linear_layers
from lorafleet.models.demo import DEMO_BASE, demo_base_place
from lorafleet.models.load import load_meta_model


@dataclass(frozen=True)
class ModuleGroup:
    """Adapted or linear layers that are alike: the same place in every block, the same shape, rank and alpha.

    Attributes:
        name: Their path, with ``*`` for the block's number.
        count: How many there are.
        in_features: Width of their input.
        out_features: Width of their output.
        r: Rank of the adapter there; none for a layer that is not adapted.
        lora_alpha: Its alpha.
        scale: The factor before ``B·A``.
        adapter_parameters: Parameters of A and B in all of them.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    r: int | None = None
    lora_alpha: float | None = None
    scale: float | None = None
    adapter_parameters: int = 0


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found.

    Attributes:
        kind: ``model`` or ``adapter``.
        target: What was inspected.
        base: The base that an adapter names, or the model itself.
        architecture: Class of the model; none where the base's config is not at hand.
        total_parameters: Parameters of the base, tied ones counted once; none where its config is not at hand.
        adapter_parameters: Parameters of A and B.
        trainable_parameters: These, and the biases and whole modules that train with them.
        reduction_ratio: ``total_parameters / trainable_parameters``: how much less there is to train and to store.
        base_bytes: Size of the base's weights, on disk where they are, else in its config's precision.
        adapter_bytes: Size of the adapter's tensors, on disk for an adapter, else in float32.
        lora: The adapter's config.
        groups: Layers by kind.
        deployability: Runtime to the reasons why it cannot serve the adapter; empty ones can.
        vllm_max_lora_rank: The smallest ``--max-lora-rank`` for vLLM.
        metadata: What lorafleet recorded beside an adapter.
    """

    kind: str
    target: str
    base: str | None
    architecture: str | None
    total_parameters: int | None
    adapter_parameters: int
    trainable_parameters: int
    reduction_ratio: float | None
    base_bytes: int | None
    adapter_bytes: int
    lora: LoraConfig
    groups: tuple[ModuleGroup, ...]
    deployability: Mapping[str, list[str]]
    vllm_max_lora_rank: int | None
    metadata: Mapping[str, Any]

    @property
    def scales(self) -> list[dict[str, float | int]]:
        """The distinct effective scales: r, lora_alpha, scale, and how many modules have them."""
        counts: Counter[tuple[int, float, float]] = Counter()
        for group in self.groups:
            if group.r is not None and group.lora_alpha is not None and group.scale is not None:
                counts[group.r, group.lora_alpha, group.scale] += group.count
        return [{"r": r, "lora_alpha": a, "scale": s, "modules": n} for (r, a, s), n in counts.items()]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lorafleet inspect --json`` prints them."""
        return asdict(self) | {"lora": self.lora.model_dump(mode="json"), "scales": self.scales}


def inspect(target: str | Path, /, **knobs: Any) -> Inspection:
    """Count parameters, shapes and bytes of an adapter, or of a model from its config alone.

    Nothing of the base is loaded: a model is built on the meta device, so a 70B answers as fast as a small one.

    Args:
        target: An adapter's folder, a model's folder, a ``.gguf`` file, or a hub id.
        knobs: Knobs of ``ModelConfig`` and, for a model, of the ``LoraConfig`` to count. For an adapter,
            ``model_name_or_path`` says where its base is, if not where the adapter says.

    Raises:
        ConfigError: Knobs are wrong, or do not fit the model.
        AdapterError: The adapter's files are wrong.
        ModelError: There is no such model.
    """
    target = str(target)
    model_config, lora = load_sections((ModelConfig, LoraConfig), None, knobs)
    folder = Path(target).expanduser()
    if (folder / CONFIG).exists() and not (folder / "config.json").exists():
        given = {
            name for name in knobs if name.replace("-", "_") not in {"model", "base_model", *ModelConfig.model_fields}
        }
        if given:
            raise ConfigError(f"{target} is an adapter and has its own {', '.join(sorted(given))}; leave them out")
        return _inspect_adapter(target, folder, model_config)
    if model_config.model_name_or_path not in (None, target):
        raise ConfigError(f"two models are named: {target!r} and {model_config.model_name_or_path!r}; name one")
    return _inspect_model(target, model_config.model_copy(update={"model_name_or_path": target}), lora)


def _inspect_model(target: str, config: ModelConfig, lora: LoraConfig) -> Inspection:
    model = load_meta_model(config)
    targets = find_targets(model, lora)
    saved = find_saved(model, lora)
    shapes = {path: linear_shape(module) for path, module in (linear_layers(model) | targets).items()}
    adapter = sum(rank_and_alpha(lora, path)[0] * sum(shapes[path]) for path in targets)
    extra = {id(p): p.numel() for module in saved.values() for p in module.parameters()}
    if lora.bias == "all":
        extra |= {id(p): p.numel() for name, p in model.named_parameters() if name.split(".")[-1] == "bias"}
    elif lora.bias == "lora_only":
        extra |= {id(b): b.numel() for m in targets.values() if (b := getattr(m, "bias", None)) is not None}
    total = sum(p.numel() for p in model.parameters())
    trainable = adapter + sum(extra.values())
    return Inspection(
        kind="model",
        target=target,
        base=target,
        architecture=type(model).__name__,
        total_parameters=total,
        adapter_parameters=adapter,
        trainable_parameters=trainable,
        reduction_ratio=total / trainable,
        base_bytes=_base_bytes(target, model),
        adapter_bytes=4 * trainable,
        lora=lora,
        groups=_groups(shapes, lora, targets),
        deployability=deployability(lora, list(targets)),
        vllm_max_lora_rank=vllm_rank_flag(lora, list(targets)),
        metadata={},
    )


def _inspect_adapter(target: str, folder: Path, config: ModelConfig) -> Inspection:
    adapter = load_adapter(folder)
    modules = adapted_modules(adapter.tensors)
    shapes = {path: _adapted_shape(adapter, path) for path in modules}
    lora_names = {name for path in modules for name in factor_names(path, adapter.tensors)}
    trainable = sum(t.numel() for name, t in adapter.tensors.items() if not is_bases(adapter.config, name))
    model = _base_model(adapter, config)
    total = None if model is None else sum(p.numel() for p in model.parameters())
    base = config.model_name_or_path or adapter.base_name
    return Inspection(
        kind="adapter",
        target=target,
        base=base,
        architecture=None if model is None else type(model).__name__,
        total_parameters=total,
        adapter_parameters=sum(t.numel() for name, t in adapter.tensors.items() if name in lora_names),
        trainable_parameters=trainable,
        reduction_ratio=None if total is None else total / trainable,
        base_bytes=None if model is None or base is None else _base_bytes(base, model),
        adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        lora=adapter.config,
        groups=_groups(shapes, adapter.config, modules),
        deployability=deployability(adapter.config, modules),
        vllm_max_lora_rank=vllm_rank_flag(adapter.config, modules),
        metadata=adapter.metadata,
    )


def _base_model(adapter: Adapter, config: ModelConfig) -> nn.Module | None:
    """The adapter's base on the meta device, where its config is on this machine or the user named it."""
    if config.model_name_or_path is not None:
        return load_meta_model(config)
    base = adapter.base_name
    local = base is not None and ((Path(base) / "config.json").is_file() or (base == DEMO_BASE and _has_demo()))
    return load_meta_model(config.model_copy(update={"model_name_or_path": base})) if local else None


def _has_demo() -> bool:
    return demo_base_place().is_dir()


def _base_bytes(target: str, model: nn.Module) -> int:
    folder = demo_base_place() if target == DEMO_BASE and _has_demo() else Path(target).expanduser()
    if folder.is_file():
        return folder.stat().st_size
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    if sizes:
        return sum(sizes)
    dtype = getattr(getattr(model, "config", None), "dtype", None) or torch.float32
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def _adapted_shape(adapter: Adapter, path: str) -> tuple[int, int]:
    a, b = (adapter.tensors[name] for name in factor_names(path, adapter.tensors))
    return a.shape[1], b.shape[0]


def _groups(shapes: Mapping[str, tuple[int, int]], lora: LoraConfig, adapted: Iterable[str]) -> tuple[ModuleGroup, ...]:
    chosen = set(adapted)
    counts: Counter[tuple[str, int, int, int | None, float | None]] = Counter()
    for path, shape in shapes.items():
        rank, alpha = rank_and_alpha(lora, path) if path in chosen else (None, None)
        counts[re.sub(r"\.\d+(?=\.)", ".*", path), *shape, rank, alpha] += 1
    groups = []
    for (name, wide, tall, rank, alpha), count in counts.items():
        scale = None if rank is None or alpha is None else lora.scaling(rank, alpha)
        size = (rank or 0) * (wide + tall) * count
        groups.append(ModuleGroup(name, count, wide, tall, rank, alpha, scale, size))
    return tuple(groups)
