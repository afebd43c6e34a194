"""What was estimated."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorafleet.estimation.memory import Precision, TrainingMemory
from lorafleet.estimation.rates import Rates

GPUS = {f"{size} GB": size * 10**9 for size in (24, 48, 80)}
"""Memory of common GPUs, by the names they are sold under; some have a little more."""


@dataclass(frozen=True)
class MethodEstimate:
    """One method.

    Attributes:
        name: The words it was asked for with.
        kind: As in a comparison.
        trainable_parameters: What trains.
        trainable_share: Of the base's parameters.
        steps: Optimizer steps.
        mean_tokens: Tokens of a micro-batch.
        largest_tokens: Tokens of the largest one, which decides the memory.
        memory: Parts of the memory of training on this machine, in bytes.
        by_precision: Bytes of training with the base in each precision, on a GPU; none where a method cannot.
        answering: Bytes of answering eight rows of ``max_length`` tokens, by precision.
        fits: Where training fits, by the place's name: the precisions.
        storage_bytes: What has to be kept of a task.
        tasks_bytes: The same for all tasks, with the base where they share it.
        flops_per_token: Operations of a token of training.
        tokens_per_second: Of training on this machine.
        seconds: All steps on this machine, without evaluations.
    """

    name: str
    kind: str
    trainable_parameters: int
    trainable_share: float
    steps: int
    mean_tokens: float
    largest_tokens: int
    memory: TrainingMemory
    by_precision: Mapping[Precision, int | None]
    answering: Mapping[Precision, int]
    fits: Mapping[str, list[Precision]]
    storage_bytes: int
    tasks_bytes: int
    flops_per_token: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What methods need, before anything is trained.

    Attributes:
        model: The base.
        data: The rows' source.
        total_parameters: Of the base.
        base_bytes: The base on disk, in the precision it trains in.
        tasks: Tasks that storage was worked out for.
        max_length: Tokens of a row when answering.
        dtype: The precision that training computes in here.
        available_bytes: Memory that is free on the device.
        rates: This machine's rates.
        methods: The methods, in the order they were named.
    """

    model: str
    data: str
    total_parameters: int
    base_bytes: int
    tasks: int
    max_length: int
    dtype: str
    available_bytes: int
    rates: Rates
    methods: tuple[MethodEstimate, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types, with the sum of each method's memory."""
        found = asdict(self)
        for one, method in zip(found["methods"], self.methods, strict=True):
            one["memory"]["total"] = method.memory.total
        return found
