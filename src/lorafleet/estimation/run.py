"""``lorafleet estimate``: parameters, memory, disk and time of methods, from shapes alone."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
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
from lorafleet.data.store import TokenRows
from lorafleet.errors import ConfigError, LorafleetError, raise_all
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
from lorafleet.methods.peft_options import prepends
from lorafleet.models.load import load_meta_model, load_tokenizer, read_config
from lorafleet.models.machine import free_memory_bytes, keep_large_allocations, pick_device, pick_dtype
from lorafleet.models.source import find_source
from lorafleet.training.setup import check_dtype

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, MethodsConfig, EstimateConfig)

ROWS = 8
"""Rows that are answered together where the memory of answering is told."""

_EPOCHS = 3
"""Passes over the rows whose micro-batches are laid out."""


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
    check_dtype(model)
    counted = _count(model, methods, load_data(data_config, load_tokenizer(model)).train)
    machine = _measure(model, counted)
    bare = _meta(model, machine.dtype)
    total = sum(one.numel() for one in bare.parameters())
    return Estimate(
        model=find_source(model).name,
        data=data_config.data,
        total_parameters=total,
        base_bytes=sum(one.nbytes for one in bare.parameters()),
        tasks=own.tasks,
        max_length=data_config.max_length,
        dtype=machine.dtype,
        available_bytes=machine.available,
        rates=machine.rates,
        methods=tuple(_estimate(one, machine, total, own.tasks, data_config.max_length) for one in counted),
    )


class _Layout(NamedTuple):
    """The micro-batches of a run.

    Args:
        steps: Optimizer steps.
        batches: Micro-batches.
        mean_tokens: Tokens of one.
        largest: Row numbers of the one that takes most.
        largest_tokens: Its tokens.
    """

    steps: int
    batches: int
    mean_tokens: float
    largest: list[int]
    largest_tokens: int


def _lay_out(training: TrainingConfig, lengths: NDArray[np.int32], *, padded: bool) -> _Layout:
    """Lay out the micro-batches of a run; where rows are padded, each takes as much as the longest."""
    schedule = Schedule(
        len(lengths), training.per_device_train_batch_size, training.gradient_accumulation_steps, training.seed
    )
    steps = schedule.total_steps(training.num_train_epochs, training.max_steps)
    epochs, rest = divmod(steps, schedule.steps_per_epoch)
    batches = [batch for epoch in range(min(epochs + 1, _EPOCHS)) for batch in schedule.micro_batches(epoch)]
    count = epochs * math.ceil(schedule.rows / schedule.batch_size) + rest * schedule.accumulation
    batches = batches[:count]
    tokens = [int(lengths[batch].sum()) for batch in batches]
    sizes = [len(batch) * int(lengths[batch].max()) for batch in batches] if padded else tokens
    worst = max(range(len(batches)), key=sizes.__getitem__)
    return _Layout(steps, count, fmean(tokens), batches[worst], tokens[worst])


@dataclass(frozen=True)
class _Shapes:
    """A method on a model without weights, and what its largest micro-batch takes."""

    model: PreTrainedModel
    slots: Slots
    cost: StepCost


@dataclass(frozen=True)
class _Counted:
    """A method, what its largest micro-batch takes in each precision, and how many micro-batches of what size."""

    method: Method
    shapes: Mapping[Precision, _Shapes]
    layout: _Layout

    def computed(self, precision: Precision) -> _Shapes:
        """The shapes in the precision that is computed in where the base is held in this one."""
        return self.shapes.get(precision) or self.shapes["bfloat16"]


@dataclass(frozen=True)
class _Machine:
    """Where training would run: precision, if files hold the weights, bytes of the program and free ones, rates."""

    device: torch.device
    dtype: Precision
    mapped: bool
    program: int
    available: int
    rates: Rates


_COMPUTED: tuple[Precision, ...] = ("float32", "bfloat16")
"""Precisions that are computed in; a quantized base is computed with in bfloat16."""


def _count(model: ModelConfig, methods: Sequence[Method], rows: TokenRows) -> list[_Counted]:
    """Run each method's largest micro-batch without values.

    Raises:
        ConfigError: Methods do not fit the model; all of them at once.
    """
    faults, found = list[str](), list[_Counted]()
    for method in methods:
        logger.info("%s: counting", method.name)
        layout = _lay_out(method.training, rows.lengths, padded=prepends(method.config))
        largest = [rows[i] for i in layout.largest]
        try:
            shapes = {name: _shapes(model, method, name, largest) for name in _COMPUTED}
        except LorafleetError as error:
            faults.append(f"method {method.name}: {error}")
        except (RuntimeError, AttributeError) as error:  # of code that looks at values
            what = str(error).partition("\n")[0]
            faults.append(f"method {method.name}: it cannot be counted without values ({type(error).__name__}: {what})")
        else:
            found.append(_Counted(method, shapes, layout))
    raise_all(ConfigError, faults, f"{find_source(model).name} cannot be trained so")
    return found


def _measure(model: ModelConfig, counted: Sequence[_Counted]) -> _Machine:
    """Find out how fast this machine is at what the model consists of."""
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    text = counted[0].shapes["float32"].model.config.get_text_config()
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * text.hidden_size
    tokens = round(fmean(one.layout.mean_tokens for one in counted))
    precision = cast(Precision, str(dtype).removeprefix("torch."))
    keep_large_allocations()
    return _Machine(
        device,
        precision,
        _mapped(model, dtype),
        # By now this process has imported what training would, and holds no model.
        ON_GPU if device.type == "cuda" else psutil.Process().memory_info().rss,
        free_memory_bytes(device),
        measure_rates(device, dtype, [one.shapes[precision].cost for one in counted], tokens * inner),
    )


def _mapped(model: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether weights come as they are from the base's files, which then lie behind them; others are converted."""
    source = find_source(model)
    stored = getattr(read_config(source, model), "dtype", None)
    return source.gguf_file is None and stored in (dtype, str(dtype).removeprefix("torch."))


def _meta(config: ModelConfig, precision: Precision) -> PreTrainedModel:
    return cast(PreTrainedModel, load_meta_model(config).to(getattr(torch, precision)))


def _shapes(config: ModelConfig, method: Method, precision: Precision, rows: Sequence[TrainRow]) -> _Shapes:
    model = _meta(config, precision)
    slots = method.start(model, method.training.seed)
    return _Shapes(model, slots, step_cost(model, slots, rows, again=method.training.gradient_accumulation_steps > 1))


def _estimate(counted: _Counted, machine: _Machine, total: int, tasks: int, length: int) -> MethodEstimate:
    method, here, layout = counted.method, counted.shapes[machine.dtype], counted.layout
    whole = method.kind == "full"
    trainable = sum(one.value.numel() for one in here.slots.slot_parameters(0).values())
    memory = training_memory(
        here.model,
        here.slots,
        here.cost,
        machine.dtype,
        machine.program,
        on_cpu=machine.device.type == "cpu",
        mapped=machine.mapped,
    )
    by_precision = {precision: _on_gpu(counted, precision) for precision in PRECISIONS}
    kept = file_bytes(here.slots)
    # Time goes with the tokens, but for the calls, which are as many in every micro-batch.
    mean = here.cost.scaled(layout.mean_tokens / layout.largest_tokens)
    seconds = layout.batches * machine.rates.seconds(mean)
    seconds += layout.steps * _OPTIMIZER_PASSES * trained_bytes(here.slots) / machine.rates.traffic
    return MethodEstimate(
        name=method.name,
        kind=method.kind,
        trainable_parameters=trainable,
        trainable_share=trainable / total,
        steps=layout.steps,
        mean_tokens=layout.mean_tokens,
        largest_tokens=layout.largest_tokens,
        memory=memory,
        by_precision=by_precision,
        answering={precision: _answering(counted.computed(precision), precision, length) for precision in PRECISIONS},
        fits=_fits(memory, by_precision, machine),
        storage_bytes=kept,
        tasks_bytes=tasks * kept + (0 if whole else base_bytes(here.model, here.slots, machine.dtype)),
        flops_per_token=here.cost.flops / layout.largest_tokens,
        tokens_per_second=layout.batches * layout.mean_tokens / seconds,
        seconds=seconds,
    )


def _answering(shapes: _Shapes, precision: Precision, length: int) -> int:
    return answering_memory(shapes.model, shapes.slots, precision, ROWS, length)


def _on_gpu(counted: _Counted, precision: Precision) -> int | None:
    """Bytes of training on a GPU; none where all weights train, which quantized ones cannot."""
    if counted.method.kind == "full" and precision not in counted.shapes:
        return None
    one = counted.computed(precision)
    return training_memory(one.model, one.slots, one.cost, precision, ON_GPU, on_cpu=False).total


_OPTIMIZER_PASSES = 10
"""Reads and writes of each trained number in a step: gradient, weight, moments; the gradient's norm and clipping."""


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
