"""``lorafleet estimate``: parameters, memory, disk and time of methods, from shapes alone."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedModel

from lorafleet.config.compare import EstimateConfig, MethodsConfig
from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import parse_methods
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.data.batches import Schedule, TrainRow
from lorafleet.data.load import load_data
from lorafleet.data.store import TokenRow
from lorafleet.errors import ConfigError, DataError, LorafleetError, raise_all
from lorafleet.estimation.memory import (
    ON_GPU,
    PRECISIONS,
    Precision,
    TrainingMemory,
    answering_memory,
    base_bytes,
    file_bytes,
    trained_bytes,
    training_memory,
)
from lorafleet.estimation.rates import Rates, measure_rates
from lorafleet.estimation.result import GPUS, Estimate, MethodEstimate
from lorafleet.estimation.step import StepCost, step_cost
from lorafleet.lora import Slots
from lorafleet.methods.method import Method, find_methods
from lorafleet.models.load import load_meta_model, load_tokenizer
from lorafleet.models.machine import free_memory_bytes, keep_large_allocations, pick_device, pick_dtype
from lorafleet.models.source import find_source

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, MethodsConfig, EstimateConfig)

ROWS = 8
"""Rows that are answered together where the memory of answering is told."""

_MOST_LOOKED_AT = 256
"""Micro-batches whose tokens are counted; of more, as many spread over the run."""


def estimate(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> Estimate:
    """Work out what methods need before anything is trained: the model is built without weights.

    Args:
        config: A YAML file, or a mapping of knobs.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are wrong, a method is unknown or does not fit the model; all at once.
        DataError: The rows cannot be read, or there are none to train on.
        ModelError: There is no such model.
    """
    model, data_config, lora, training, wanted, own = load_sections(SECTIONS, config, knobs)
    methods = find_methods(parse_methods(wanted.methods), lora, training)
    program = psutil.Process().memory_info().rss
    device = pick_device(model.device)
    dtype = cast(Precision, str(pick_dtype(model.dtype, device)).removeprefix("torch."))
    data = load_data(data_config, load_tokenizer(model))
    if "train" not in data.splits:
        raise DataError(f"{data_config.data} has no rows to train on, only {', '.join(data.splits)}")
    faults, found = list[str](), list[tuple[Method, _Batches, dict[str, _Shapes]]]()
    for method in methods:
        logger.info("%s: counting", method.name)
        batches = _batches(method.training, data.splits["train"])
        try:
            found.append((method, batches, {name: _shapes(model, method, name, batches.largest) for name in _COMPUTED}))
        except LorafleetError as error:
            faults.append(f"method {method.name}: {error}")
    raise_all(ConfigError, faults, f"{find_source(model).name} cannot be trained so")
    bare = _meta(model, dtype)
    text = bare.config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    keep_large_allocations()
    mean = round(fmean(batches.mean_tokens for _, batches, _ in found))
    machine = _Machine(
        device,
        dtype,
        ON_GPU if device.type == "cuda" else program,
        free_memory_bytes(device),
        measure_rates(device, getattr(torch, dtype), mean, text.hidden_size, inner),
    )
    own_bytes = sum(one.nbytes for one in bare.parameters())
    return Estimate(
        model=find_source(model).name,
        data=data_config.data,
        total_parameters=sum(one.numel() for one in bare.parameters()),
        base_bytes=own_bytes,
        tasks=own.tasks,
        max_length=data_config.max_length,
        dtype=dtype,
        available_bytes=machine.available,
        rates=machine.rates,
        methods=tuple(
            _estimate(method, batches, shapes, machine, own.tasks, data_config.max_length)
            for method, batches, shapes in found
        ),
    )


@dataclass(frozen=True)
class _Machine:
    device: torch.device
    dtype: Precision
    program: int
    available: int
    rates: Rates


@dataclass(frozen=True)
class _Batches:
    """The micro-batches of a run: steps, how many there are, their mean tokens, and the rows of the largest."""

    steps: int
    count: int
    mean_tokens: float
    largest: list[TokenRow]


@dataclass(frozen=True)
class _Shapes:
    """A method on a model without weights, and what its largest micro-batch takes."""

    model: PreTrainedModel
    slots: Slots
    cost: StepCost


_COMPUTED: tuple[Precision, ...] = ("float32", "bfloat16")
"""Precisions that are computed in; a quantized base is computed with in bfloat16."""


def _batches(training: TrainingConfig, rows: Sequence[TokenRow]) -> _Batches:
    schedule = Schedule(
        len(rows), training.per_device_train_batch_size, training.gradient_accumulation_steps, training.seed
    )
    steps = schedule.total_steps(training.num_train_epochs, training.max_steps)
    every = max(1, steps // _MOST_LOOKED_AT)
    windows = [schedule.window(step) for step in range(0, steps, every)]
    batches = [batch for window in windows for batch in window]
    tokens = [sum(len(rows[i].input_ids) for i in batch) for batch in batches]
    largest = batches[max(range(len(batches)), key=tokens.__getitem__)]
    count = round(steps * len(batches) / len(windows))
    return _Batches(steps, count, fmean(tokens), [rows[i] for i in largest])


def _meta(config: ModelConfig, precision: Precision) -> PreTrainedModel:
    return cast(PreTrainedModel, load_meta_model(config).to(getattr(torch, precision)))


def _shapes(config: ModelConfig, method: Method, precision: Precision, rows: Sequence[TrainRow]) -> _Shapes:
    model = _meta(config, precision)
    slots = method.start(model, method.training.seed)
    return _Shapes(model, slots, step_cost(model, slots, rows))


def _estimate(
    method: Method, batches: _Batches, shapes: Mapping[str, _Shapes], machine: _Machine, tasks: int, length: int
) -> MethodEstimate:
    here = shapes[machine.dtype]
    whole = method.kind == "full"
    trainable = sum(one.value.numel() for one in here.slots.slot_parameters(0).values())
    total = sum(one.numel() for one in here.model.parameters())
    on_cpu = machine.device.type == "cpu"
    memory = training_memory(here.model, here.slots, here.cost, machine.dtype, machine.program, on_cpu=on_cpu)
    by_precision: dict[Precision, int | None] = {}
    answering: dict[Precision, int] = {}
    for precision in PRECISIONS:
        one = shapes.get(precision) or shapes["bfloat16"]
        quantized = precision not in shapes
        answering[precision] = answering_memory(one.model, one.slots, precision, ROWS, length)
        by_precision[precision] = (
            None
            if whole and quantized
            else training_memory(one.model, one.slots, one.cost, precision, ON_GPU, on_cpu=False).total
        )
    kept = file_bytes(here.slots)
    # Time goes with the tokens, but for the calls, which are as many in every micro-batch.
    share = batches.mean_tokens / here.cost.tokens
    mean = replace(here.cost, flops=round(here.cost.flops * share), traffic=round(here.cost.traffic * share))
    seconds = batches.count * machine.rates.seconds(mean, frozen=not whole)
    seconds += batches.steps * _OPTIMIZER_PASSES * trained_bytes(here.slots) / machine.rates.traffic
    return MethodEstimate(
        name=method.name,
        kind=method.kind,
        trainable_parameters=trainable,
        trainable_share=trainable / total,
        steps=batches.steps,
        mean_tokens=batches.mean_tokens,
        largest_tokens=here.cost.tokens,
        memory=memory,
        by_precision=by_precision,
        answering=answering,
        fits=_fits(memory, by_precision, machine),
        storage_bytes=kept,
        tasks_bytes=tasks * kept + (0 if whole else base_bytes(here.model, here.slots, machine.dtype)),
        flops_per_token=here.cost.flops / here.cost.tokens,
        tokens_per_second=batches.count * batches.mean_tokens / seconds,
        seconds=seconds,
    )


_OPTIMIZER_PASSES = 9
"""Reads and writes of each trained number in a step: gradient, weight, both moments; and the gradient's norm."""


def _fits(
    memory: TrainingMemory, by_precision: Mapping[Precision, int | None], machine: _Machine
) -> dict[str, list[Precision]]:
    """Where training fits: here in the precision that it computes in, on common GPUs in any."""
    here = "this GPU" if machine.device.type == "cuda" else "this machine"
    found: dict[str, list[Precision]] = {
        here: [machine.dtype] if memory.total - machine.program <= machine.available else []
    }
    for name, size in GPUS.items():
        found[name] = [p for p, needed in by_precision.items() if needed is not None and needed <= size]
    return found
