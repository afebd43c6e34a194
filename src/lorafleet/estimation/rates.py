"""How fast this machine is at what training consists of, measured in seconds."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lorafleet.estimation.ledger import Product
from lorafleet.estimation.step import StepCost
from lorafleet.lora.packed import pack

_SECONDS = 0.25
"""How long traffic and calls are measured."""

_ROUNDS, _PRODUCT_SECONDS = 3, 0.02
"""How often each shape of product is measured, in turns with the others, and how long: other programs disturb some."""

_UNCACHED = 256 * 2**20
"""Bytes that no cache holds."""

_ROWS, _WORK = 1024, 2e10
"""Larger products are measured with so many rows, and as many columns as leave so many operations."""

_RARE = 0.002
"""Shapes with a smaller share of the operations are not measured."""

PRODUCTS = 0.9
"""Rate of products in a model over that of the same products by themselves. Found, as the next, by
``benchmarks.estimate``."""

CALLS = 12.0
"""Time from one kernel to the next in a model, Python's part included, over that of a bare call."""


@dataclass(frozen=True)
class ProductRate:
    """Operations a second of products of one shape."""

    shape: Product
    flops: float


@dataclass(frozen=True)
class Rates:
    """This machine's rates.

    Attributes:
        device: Where they were measured.
        products: Of the products that training consists of.
        flops: Operations a second of all those together.
        traffic: Bytes a second that elementwise work reads and writes.
        call: Seconds of calling a kernel.
    """

    device: str
    products: tuple[ProductRate, ...]
    flops: float
    traffic: float
    call: float

    def seconds(self, cost: StepCost) -> float:
        """The time of a forward and a backward pass."""
        rates = {one.shape: one.flops for one in self.products}
        measured = {shape: flops for shape, flops in cost.products.items() if shape in rates}
        products = sum(flops / rates[shape] for shape, flops in measured.items())
        products += (cost.flops - sum(measured.values())) / self.flops
        return products / PRODUCTS + cost.traffic / self.traffic + cost.calls * self.call * CALLS


def measure_rates(device: torch.device, dtype: torch.dtype, costs: Iterable[StepCost], numbers: int) -> Rates:
    """Measure with the shapes of a model.

    Args:
        device: Where.
        dtype: Precision of the products.
        costs: What will be computed.
        numbers: Of a typical activation.
    """
    work = Counter[Product]()
    for cost in costs:
        work.update(cost.products)
    least = _RARE * sum(work.values())
    shapes = [shape for shape, flops in work.items() if flops >= least]
    rounds = [[_product_rate(shape, device, dtype) for shape in shapes] for _ in range(_ROUNDS)]
    products = dict(zip(shapes, map(max, *rounds), strict=True))
    together = sum(work[shape] for shape in products) / sum(work[shape] / products[shape] for shape in products)
    numbers = min(numbers, _ROWS * 8192)
    # As many as no cache holds: a model's activations are read from memory.
    wide = [torch.randn(numbers, device=device, dtype=dtype) for _ in range(_many(numbers))]
    small = torch.zeros(1, device=device)

    def elementwise() -> None:
        for one, other in zip(wide, [*wide[1:], wide[0]], strict=True):
            torch.mul(one, 2, out=other)

    def calls() -> None:
        for _ in range(100):
            torch.add(small, 1)

    return Rates(
        device=str(device),
        products=tuple(ProductRate(shape, rate) for shape, rate in products.items()),
        flops=together,
        traffic=2 * sum(one.nbytes for one in wide) / _fastest(elementwise, device, _SECONDS),
        call=_fastest(calls, device, _SECONDS) / 100,
    )


def _product_rate(shape: Product, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second, with other operands in each call as in a model, where they are small."""
    rows = min(shape.rows, _ROWS)
    columns = max(1, min(shape.columns, int(_WORK / (2 * shape.batch * rows * shape.inner))))
    work = 2 * shape.batch * rows * shape.inner * columns
    times = range(max(1, min(4, int(_WORK / work))))
    left = [torch.randn(shape.batch, rows, shape.inner, device=device, dtype=dtype) for _ in times]
    right = [torch.randn(shape.batch, columns, shape.inner, device=device, dtype=dtype) for _ in times]
    packed = [pack(one[0]) if shape.laid_out else None for one in right]

    def run() -> None:
        for a, b, layout in zip(left, right, packed, strict=True):
            if layout is not None:
                layout.linear(a[0], None)
            elif shape.batch == 1:
                torch.mm(a[0], b[0].T)
            else:
                torch.bmm(a, b.mT)

    return len(times) * work / _fastest(run, device, _PRODUCT_SECONDS)


def _many(numbers: int) -> int:
    """How many tensors of so many float32 numbers are more than caches hold; of tiny ones, few enough to be made."""
    return min(max(2, math.ceil(_UNCACHED / (4 * numbers))), 256)


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of several runs; the others were disturbed."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
