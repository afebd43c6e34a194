"""Where the bytes go: of training, by part and by the base's precision; of answering; on disk."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from lorafleet.estimation.ledger import NoValues
from lorafleet.estimation.step import StepCost, laid_out_weights
from lorafleet.lora import Slots
from lorafleet.lora.targets import linear_layers, output_head
from lorafleet.methods.full import FullModel

Precision = Literal["float32", "bfloat16", "int8", "nf4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_QUANTIZED_BYTES = {"int8": 1 + 4 / 4096, "nf4": 0.5 + 0.127 / 8}
"""Bytes of one weight: int8 with a float32 scale for each row (Dettmers et al. 2022, arXiv 2208.07339), here 4096 wide;
NF4 with its scales quantized too, 0.127 bits a weight (Dettmers et al. 2023, arXiv 2305.14314)."""

CUDA_CONTEXT = 500 * 2**20
"""What CUDA takes on a GPU before anything is put there."""

CUBLAS_WORKSPACES = 64 * 2**20
"""What PyTorch lends the libraries of matrix products on a GPU, and never takes back."""

_GAPS, _GAPS_OF_ACTIVATIONS, _GAPS_OF_LOGITS = 150e6, 0.3, 0.6
"""Gaps in a CPU's memory: so many bytes, and shares of what comes and goes. Found by ``benchmarks.estimate``."""

ON_GPU = CUDA_CONTEXT + CUBLAS_WORKSPACES


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the worst moment of training.

    Attributes:
        program: Python and its libraries, or what CUDA takes.
        weights: The base, the layouts that make its products fast, and what trains.
        gradients: Of what trains.
        optimizer: AdamW's two moments.
        best: The copy of the best so far.
        activations: What the backward pass needs, and what is in use at the time.
        logits: Logits and their gradients.
        gaps: What a CPU's allocator holds between them and cannot give out, as sizes differ from step to step.
    """

    program: int
    weights: int
    gradients: int
    optimizer: int
    best: int
    activations: int
    logits: int
    gaps: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def training_memory(
    model: PreTrainedModel,
    slots: Slots,
    cost: StepCost,
    precision: Precision,
    program: int,
    *,
    on_cpu: bool,
    mapped: bool = False,
) -> TrainingMemory:
    """Put together what training takes.

    Args:
        model: On the meta device, in the precision that it computes in.
        slots: A method on it.
        cost: Of the largest micro-batch.
        precision: How the base is held.
        program: Bytes of the process without a model; on a GPU, of CUDA and its libraries.
        on_cpu: On a CPU, frozen float32 weights are laid out for both directions of their products.
        mapped: Whether the weights are mapped from a file, so that the originals leave memory.
    """
    trained = trained_bytes(slots)
    weights = base_bytes(model, slots, precision) + trained
    if on_cpu and precision == "float32":
        weights += _layout_bytes(model, slots, mapped)
    inside = cost.peak_bytes - trained  # at the end of the backward pass all gradients are there
    logits = min(cost.logits_bytes, inside)
    activations = inside - logits
    gaps = round(_GAPS + _GAPS_OF_ACTIVATIONS * activations + _GAPS_OF_LOGITS * logits) if on_cpu else 0
    return TrainingMemory(program, weights, trained, 2 * trained, trained, activations, logits, gaps)


def trained_bytes(slots: Slots) -> int:
    """Bytes of everything that trains."""
    return sum(one.value.nbytes for one in slots.slot_parameters(0).values())


def base_bytes(model: PreTrainedModel, slots: Slots, precision: Precision) -> int:
    """Bytes of the weights that do not train, in a precision."""
    return _bytes(model, precision, {id(one.parameter) for one in slots.slot_parameters(0).values()})


def _bytes(model: PreTrainedModel, precision: Precision, apart: Collection[int]) -> int:
    """Bytes of all weights but those ``apart``; quantized are the linear layers, not the head."""
    quantized = _quantized(model) if precision in _QUANTIZED_BYTES else set()
    size = 0.0
    for one in model.parameters():
        if id(one) not in apart:
            size += one.numel() * _QUANTIZED_BYTES[precision] if id(one) in quantized else one.nbytes
    return int(size)


def _quantized(model: nn.Module) -> set[int]:
    head = output_head(model)
    return {id(layer.weight) for layer in linear_layers(model).values() if layer is not head}


def _layout_bytes(model: PreTrainedModel, slots: Slots, mapped: bool) -> int:
    """Two copies of each weight that is laid out; those of LoRA's layers that a file has are let out of memory."""
    head, layers = laid_out_weights(model, slots)
    return 2 * sum(one.nbytes for one in head) + (1 if mapped else 2) * sum(one.nbytes for one in layers)


def answering_memory(model: PreTrainedModel, slots: Slots, precision: Precision, rows: int, length: int) -> int:
    """Bytes of weights and of a full cache of keys and values."""
    cache = rows * length * _cache_bytes(model)
    if isinstance(slots, FullModel):
        return _bytes(model, precision, ()) + cache
    return base_bytes(model, slots, precision) + trained_bytes(slots) + cache


def _cache_bytes(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers; none where there is no attention."""
    config: Any = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    frozen = next((one for one in model.parameters() if not one.requires_grad), None)
    dtype = model.dtype if frozen is None else frozen.dtype
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def file_bytes(slots: Slots) -> int:
    """What has to be kept of a task."""
    with NoValues():
        return sum(tensor.nbytes for tensor in slots.state_dict(0).values())
