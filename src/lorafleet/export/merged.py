"""``lorafleet merge``: fold an adapter into its base, write the model, and prove that it answers as the adapter did."""

import gc
import logging
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafleet.config.load import load_sections
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.use import AdapterConfig, MergeConfig
from lorafleet.errors import AdapterError, ConfigError, LorafleetError, raise_all
from lorafleet.export.unwrap import changed_tensors, digests, unwrap
from lorafleet.export.verification import Expected, Verdict, logits_of, probe_ids, relative, verify
from lorafleet.files.adapter import Adapter, load_adapter
from lorafleet.files.adapter_tensors import is_bases
from lorafleet.files.atomic import write_json
from lorafleet.files.method import saved_kind
from lorafleet.files.model_folder import new_folder, save_model, sync_tree
from lorafleet.generation.adapted import base_of, load_adapted
from lorafleet.lora import LoraBank, inject_lora, without_absent
from lorafleet.models.load import Base, load_base, load_meta_model, read_config
from lorafleet.models.machine import available_memory_bytes
from lorafleet.models.source import find_source
from lorafleet.registry.use import located

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, AdapterConfig, RegistryConfig, MergeConfig)
RECORD = "lorafleet_merge.json"


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, checked before anything is written.

    Attributes:
        model: The base to load.
        adapter: The adapter's folder and the check of its base.
        output_dir: Where the model goes.
        dtype: The precision of the written weights.
        parameters: Of the model, tied weights counted once.
        bytes: Size of the weights to write.
    """

    model: ModelConfig
    adapter: AdapterConfig
    output_dir: Path
    dtype: torch.dtype
    parameters: int
    bytes: int


@dataclass(frozen=True)
class MergeResult:
    """A merged model, and how it was checked.

    Attributes:
        output_dir: The model's folder, for any tool that loads Hugging Face models.
        model: The base.
        adapter: The adapter's folder.
        dtype: The precision of the written weights.
        changed_tensors: Tensors whose bytes differ from the base's.
        unchanged_tensors: Tensors whose bytes are the base's.
        untied: Whether input embeddings and output head, one matrix in the base, are two now.
        adapter_effect: How far the adapter moves the base's logits, max|Δ| / max|logit|.
        logits_difference: How far the reloaded model's logits are from the unmerged adapter's, same measure.
        tolerance: The largest difference that was accepted.
        bytes: Of the folder.
        seconds: From start to end.
    """

    output_dir: str
    model: str
    adapter: str
    dtype: str
    changed_tensors: int
    unchanged_tensors: int
    untied: bool
    adapter_effect: float
    logits_difference: float
    tolerance: float
    bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def merge(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> MergeResult:
    """Write the model ``W = W0 + scaling·B·A`` and check it.

    The written model is loaded again; its logits must equal those of the unmerged adapter, the tensors that the adapter
    changes must differ from the base's and all others must not. A model that fails is deleted.

    Args:
        config: A YAML file, or a mapping of knobs.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are wrong, or the merge cannot be done as asked; lists every fault.
        AdapterError: The adapter is damaged, belongs to another base, or the written model failed its check.
        ModelError: The base cannot be loaded.
    """
    started = time.perf_counter()
    model, adapter, registry, merging = load_sections(SECTIONS, config, knobs)
    plan = plan_merge(model, located(adapter, registry), merging)
    with new_folder(plan.output_dir) as temporary:
        expected = write_merged(plan, temporary)
        gc.collect()  # the first copy of the model goes before the second comes
        verdict = verify(_reload(plan, temporary), expected)
        write_json(temporary / RECORD, _record(plan, expected, verdict))
        sync_tree(temporary)
    logger.info("merged model in %s: logits within %.1e of the adapter's", plan.output_dir, verdict.logits_difference)
    return MergeResult(
        output_dir=str(plan.output_dir),
        model=expected.base_name,
        adapter=str(plan.adapter.adapter),
        dtype=str(plan.dtype).removeprefix("torch."),
        changed_tensors=verdict.changed,
        unchanged_tensors=verdict.unchanged,
        untied=expected.untied,
        adapter_effect=expected.adapter_effect,
        logits_difference=verdict.logits_difference,
        tolerance=verdict.tolerance,
        bytes=sum(file.stat().st_size for file in plan.output_dir.rglob("*") if file.is_file()),
        seconds=time.perf_counter() - started,
    )


def plan_merge(model: ModelConfig, adapter_config: AdapterConfig, merging: MergeConfig) -> MergePlan:
    """Decide what to do and check that it can be done, reading no weights but the adapter's.

    Raises:
        ConfigError: Every fault at once: no adapter, a folder in the way, an adapter that does not fit or changes
            nothing, too little disk space.
        AdapterError: The adapter cannot be read.
    """
    if adapter_config.adapter is None:
        raise ConfigError("adapter is required: name the folder of the adapter to merge")
    folder, output_dir = Path(adapter_config.adapter), Path(merging.output_dir)
    if (kind := saved_kind(folder)) != "lora":
        raise ConfigError(f"the adapter in {folder} is {kind}; merging folds LoRA into its base, nothing else")
    adapter = load_adapter(folder)
    model = base_of(model, adapter, folder)
    source = find_source(model)
    faults = _folder_faults(output_dir, {"adapter": folder, "base": Path(source.path)}, merging.overwrite)
    faults += _adapter_faults(adapter, folder)
    dtype = _written_dtype(model, merging)
    parameters = 0
    try:
        meta = load_meta_model(model)
        parameters = sum(p.numel() for p in meta.parameters()) + sum(
            t.numel()
            for name, t in adapter.tensors.items()
            if ".lora_" not in name and not is_bases(adapter.config, name)
        )
        bank = inject_lora(meta, without_absent(meta, adapter.config))
        bank.load_state_dict(0, adapter.tensors)
        uses = Counter(id(p) for _, p in meta.named_parameters(remove_duplicate=False))
        untied = {id(one.weight): one.weight.numel() for one in bank.layers.values() if uses[id(one.weight)] > 1}
        parameters += sum(untied.values())
    except LorafleetError as error:
        faults.append(f"the adapter in {folder} does not fit {source.name}: {error}")
    needed = parameters * dtype.itemsize
    free = shutil.disk_usage(_existing(output_dir)).free
    if needed > free:
        faults.append(f"{output_dir} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")
    raise_all(ConfigError, faults, "the merge cannot be done")
    return MergePlan(model, adapter_config, output_dir, dtype, parameters, needed)


def write_merged(plan: MergePlan, folder: Path) -> Expected:
    """Load base and adapter, merge, and save model, tokenizer and template; return what the model must answer.

    Raises:
        AdapterError: The adapter was trained on another base, leaves the logits as they are, or merging in memory
            already changes them.
    """
    adapted = load_adapted(plan.model, plan.adapter)
    base, bank = adapted.base, adapted.bank
    assert isinstance(bank, LoraBank)  # a plan has an adapter, of LoRA
    probe = probe_ids(base)
    precision = _checking_precision(base, plan.parameters)
    base.model.to(dtype=precision)  # type: ignore[call-arg]
    with bank.disabled():
        bare = logits_of(base.model, probe)
    unmerged = logits_of(base.model, probe)
    base.model.to(dtype=base.dtype)  # type: ignore[call-arg]
    effect = relative(unmerged, bare)
    if effect == 0:
        raise AdapterError(
            f"the adapter in {plan.adapter.adapter} leaves every logit as it is; there is nothing to merge"
        )
    before = digests(base.model, bank, plan.dtype)
    changed = changed_tensors(bank, adapted.slot)
    bank.merge(adapted.slot)
    untied = unwrap(base.model, bank, adapted.slot)
    logger.info("%d of %d tensors changed; writing %s", len(changed), len(before), plan.dtype)
    base.model.to(dtype=plan.dtype)  # type: ignore[call-arg]
    save_model(base.model, base.tokenizer, folder)
    return Expected(
        base_name=base.name,
        base_hash=base.weights_hash,
        probe=probe,
        logits=unmerged,
        compute_dtype=precision,
        digests=before,
        changed=changed,
        adapter_effect=effect,
        untied=untied,
    )


def _checking_precision(base: Base, parameters: int) -> torch.dtype:
    """In which precision logits are compared: float64 where it fits, so that the order of additions does not count.

    Measured on 30 layers in float32: weights rounded to float32 move the logits by 5e-7, other kernels by up to 9e-6.
    """
    fits = available_memory_bytes() > 2 * parameters * torch.float64.itemsize
    return torch.float64 if base.dtype == torch.float32 and base.device.type == "cpu" and fits else base.dtype


def _reload(plan: MergePlan, folder: Path) -> Base:
    written = {"model_name_or_path": str(folder), "revision": None, "dtype": str(plan.dtype).removeprefix("torch.")}
    return load_base(plan.model.model_copy(update=written))


def _folder_faults(output_dir: Path, inputs: Mapping[str, Path], overwrite: bool) -> list[str]:
    faults = []
    for what, path in inputs.items():
        if path.exists() and (
            output_dir.resolve() == path.resolve() or path.resolve().is_relative_to(output_dir.resolve())
        ):
            faults.append(f"output_dir {output_dir} holds the {what} ({path}); choose another folder")
    if output_dir.exists() and not output_dir.is_dir():
        faults.append(f"output_dir {output_dir} is a file")
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        if not (output_dir / RECORD).exists():
            faults.append(f"output_dir {output_dir} holds something else than a merged model; choose another folder")
        elif not overwrite:
            faults.append(f"output_dir {output_dir} holds a merged model; replace it with overwrite, or choose another")
    return faults


def _adapter_faults(adapter: Adapter, folder: Path) -> list[str]:
    """An adapter whose B (A of an embedding) are all zero was never trained: merging it would write the base again."""
    zeros = (".lora_B.weight", ".lora_embedding_A")
    products = {name: tensor for name, tensor in adapter.tensors.items() if name.endswith(zeros)}
    others = len(adapter.tensors) > 2 * len(products)
    if products and not others and not any(tensor.any() for tensor in products.values()):
        return [f"every lora_B of the adapter in {folder} is zero, so it changes nothing; train it first"]
    return []


def _written_dtype(model: ModelConfig, merging: MergeConfig) -> torch.dtype:
    """The precision to write: what is asked for, else that of the base's files."""
    if merging.merge_dtype != "auto":
        asked: torch.dtype = getattr(torch, merging.merge_dtype)
        return asked
    stored = getattr(read_config(find_source(model), model), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


def _record(plan: MergePlan, expected: Expected, verdict: Verdict) -> dict[str, Any]:
    return {
        "base": expected.base_name,
        "base_weights_hash": expected.base_hash,
        "adapter": str(plan.adapter.adapter),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "changed_tensors": sorted(expected.changed),
        "adapter_effect": expected.adapter_effect,
        "logits_difference": verdict.logits_difference,
        "tolerance": verdict.tolerance,
    }


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
