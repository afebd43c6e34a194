"""How fast this machine is at what training consists of, measured in about a second."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafleet.estimation.step import StepCost
from lorafleet.lora.packed import pack

_SECONDS = 0.25
"""How long each rate is measured."""

_UNCACHED = 256 * 2**20
"""Bytes that no cache holds."""

_LARGEST = (1024, 2048, 8192)

CALLS = 12.0
"""Time from one kernel to the next in a model, Python's part included, over that of a bare call. Found, as the next,
by ``benchmarks.estimate``."""

PRODUCTS = 0.8
"""Rate of a model's products, thin ones among them, over that of its largest."""


@dataclass(frozen=True)
class Rates:
    """This machine's rates.

    Attributes:
        device: Where they were measured.
        flops: Operations a second of products with a frozen weight.
        flops_trained: The same with a weight that trains, which cannot be laid out for them.
        traffic: Bytes a second that elementwise work reads and writes.
        call: Seconds of calling a kernel.
    """

    device: str
    flops: float
    flops_trained: float
    traffic: float
    call: float

    def seconds(self, cost: StepCost, *, frozen: bool) -> float:
        """The time of a forward and a backward pass."""
        products = cost.flops / (PRODUCTS * (self.flops if frozen else self.flops_trained))
        return products + cost.traffic / self.traffic + cost.calls * self.call * CALLS


def measure_rates(device: torch.device, dtype: torch.dtype, tokens: int, width: int, inner: int) -> Rates:
    """Measure with the shapes of a model.

    Args:
        device: Where.
        dtype: Precision of the products.
        tokens: Rows.
        width: The model's hidden size.
        inner: Width inside its MLP.

    Larger models are measured at :data:`_LARGEST`, where rates no longer change and little memory is needed.
    """
    tokens, width, inner = (min(pair) for pair in zip((tokens, width, inner), _LARGEST, strict=True))
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    # As many weights as no cache holds: a model's are read from memory in every pass, and its activations too.
    weights = [torch.randn(inner, width, device=device, dtype=dtype) for _ in range(_many(inner * width))]
    packed = [pack(weight) for weight in weights]
    wide = [torch.randn(tokens, inner, device=device, dtype=dtype) for _ in range(_many(tokens * inner))]
    small = torch.zeros(1, device=device)

    def plain() -> None:
        for weight in weights:
            torch.mm(torch.mm(x, weight.T), weight)

    def frozen() -> None:
        for one in packed:
            assert one is not None
            one.input_gradient(one.linear(x, None))

    def elementwise() -> None:
        for one in wide:
            torch.mul(one, 2)

    def calls() -> None:
        for _ in range(100):
            torch.add(small, 1)

    work = 2 * 2 * tokens * width * inner * len(weights)
    trained = work / _fastest(plain, device)
    return Rates(
        device=str(device),
        flops=trained if None in packed else work / _fastest(frozen, device),
        flops_trained=trained,
        traffic=2 * sum(one.nbytes for one in wide) / _fastest(elementwise, device),
        call=_fastest(calls, device) / 100,
    )


def _many(numbers: int) -> int:
    """How many tensors of so many float32 numbers are more than caches hold; of tiny ones, few enough to be made."""
    return min(max(2, math.ceil(_UNCACHED / (4 * numbers))), 256)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs; the others were disturbed."""
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end:
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
