"""How long the matrix products of a training step take at the best kernel that this machine has for them.

Only the products that a LoRA step on a frozen base cannot do without, in their actual shapes: the forward product of
each linear layer, the product for the gradient of its input where anything below it trains, the r-wide products of
LoRA, and the output head on the supervised positions, forward and gradient. Attention's products are measured apart.
Each is timed with every kernel and memory layout that a loop could use for it, and the fastest counts.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as combinations
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]

_CACHE_BYTES = 64 << 20
"""Operands are rotated through sets of about this size, as the weights of different layers are not in the cache."""


@dataclass(frozen=True)
class Product:
    """``(m, k) · (k, n)``, or a batch of them.

    Args:
        group: What it is for; one of the names in ``Need.seconds``.
        m: Rows of the result.
        k: Inner size.
        n: Columns of the result.
        free: Which of ``a``, ``b`` and ``y`` (the result) a loop may store transposed: weights and r-wide tensors,
            but not the activations that the rest of the model reads and writes.
        adds: Whether the result is added to what is there, as LoRA's updates are.
        batch: Number of such products at once; 0 for a plain one.
    """

    group: str
    m: int
    k: int
    n: int
    free: str = "b"
    adds: bool = False
    batch: int = 0


@dataclass(frozen=True)
class LinearShape:
    """A linear layer with LoRA: its sizes, the rank, and whether the gradient of its input is needed."""

    inputs: int
    outputs: int
    rank: int
    needs_input_grad: bool


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its products: linear layers, hidden size and vocabulary of the head, attention heads."""

    linears: tuple[LinearShape, ...]
    hidden: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class BatchShape:
    """What of a batch decides its products.

    Args:
        lengths: Tokens of each sequence.
        targets: Supervised tokens.
        prompt: Tokens with which all sequences begin alike, if they are to be computed once; attention is not.
    """

    lengths: tuple[int, ...]
    targets: int
    prompt: int = 0

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    @property
    def computed(self) -> int:
        """Tokens that go through the linear layers; of the last one's, 2 to 3 % of all, some could be left out."""
        return self.tokens - self.prompt * (len(self.lengths) - 1)


def step_products(model: ModelShape, batch: BatchShape) -> Counter[Product]:
    """Every product of one training step and how often it occurs."""
    found: Counter[Product] = Counter()
    for layer in model.linears:
        found.update(_linear_products(layer, batch.computed))
    found[Product("head", batch.targets, model.hidden, model.vocabulary)] += 1
    found[Product("head", batch.targets, model.vocabulary, model.hidden)] += 1
    for length, count in Counter(batch.lengths).items():
        for one in _attention_products(model, length, count):
            found[one] += model.layers
    return found


def _linear_products(layer: LinearShape, tokens: int) -> Iterator[Product]:
    wide_in, wide_out, r = layer.inputs, layer.outputs, layer.rank
    yield Product("forward", tokens, wide_in, wide_out)
    yield Product("lora", tokens, wide_in, r, free="by")  # h = x·Aᵀ
    yield Product("lora", tokens, r, wide_out, free="ab", adds=True)  # y += h·Bᵀ
    yield Product("lora", tokens, wide_out, r, free="by")  # dh = dy·B
    yield Product("lora", r, tokens, wide_out, free="ay")  # dBᵀ = hᵀ·dy
    yield Product("lora", r, tokens, wide_in, free="ay")  # dA = dhᵀ·x
    if layer.needs_input_grad:
        yield Product("gradient", tokens, wide_out, wide_in)
        yield Product("lora", tokens, r, wide_in, free="ab", adds=True)  # dx += dh·A


def _attention_products(model: ModelShape, length: int, count: int) -> Iterator[Product]:
    """Scores and values of ``count`` sequences, forward and backward; queries that share a key are rows of one."""
    batch, rows, d = count * model.kv_heads, length * model.heads // model.kv_heads, model.head_dim
    for _ in range(2):  # q·kᵀ and dy·vᵀ
        yield Product("attention", rows, d, length, free="aby", batch=batch)
    for _ in range(2):  # p·v and ds·k
        yield Product("attention", rows, length, d, free="aby", batch=batch)
    for _ in range(2):  # dsᵀ·q and pᵀ·dy
        yield Product("attention", length, rows, d, free="aby", batch=batch)


# -- kernels ----------------------------------------------------------------------------------------------------------


def kernels(product: Product) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Every way to compute a product: its name, and what lays fresh operands out and returns the call to time."""
    flips = [(False, True) if operand in product.free else (False,) for operand in "aby"]
    for layout in combinations(*flips):
        name = "".join("t" if flip else "n" for flip in layout)
        yield f"{'addmm' if product.adds else 'mm'} {name}", partial(_mm_call, product, *layout)
    if product.free == "b":
        yield "F.linear", partial(_linear_call, product)
        if _has_packed_linear():
            yield "oneDNN packed", partial(_packed_call, product)


def _mm_call(product: Product, flip_a: bool, flip_b: bool, flip_y: bool) -> Call:
    a = _stored(product.batch, product.m, product.k, flip_a)
    b = _stored(product.batch, product.k, product.n, flip_b)
    y = _stored(product.batch, product.m, product.n, flip_y)
    if product.adds:
        return partial(y.addmm_, a, b)
    return partial(torch.bmm if product.batch else torch.mm, a, b, out=y)


def _linear_call(product: Product) -> Call:
    return partial(F.linear, _stored(0, product.m, product.k, False), _stored(0, product.n, product.k, False))


def _packed_call(product: Product) -> Call:
    """The weight in oneDNN's own layout; what inductor uses for frozen weights. Private operators."""
    weight = _stored(0, product.n, product.k, False)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, product.m)
    x = _stored(0, product.m, product.k, False)
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")


def _has_packed_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _stored(batch: int, rows: int, columns: int, flip: bool) -> Tensor:
    """Random numbers ``([batch,] rows, columns)``, stored transposed if ``flip``. A short pattern, repeated: faster."""
    shape = (*([batch] if batch else []), *((columns, rows) if flip else (rows, columns)))
    size = math.prod(shape)
    tensor = torch.randn(min(size, 1 << 16)).repeat(math.ceil(size / (1 << 16)))[:size].view(shape)
    return tensor.mT if flip else tensor


def best_kernel(product: Product, seconds: float = 0.004) -> tuple[float, str]:
    """Time of a product at its fastest kernel, and the kernel's name.

    Args:
        product: What to compute.
        seconds: Least time to spend on each kernel; each runs at least three times after a first one.

    Returns:
        The median over its runs, in seconds.
    """
    size = 4 * max(1, product.batch) * (product.m * product.k + product.k * product.n + product.m * product.n)
    sets = min(4, max(1, _CACHE_BYTES // size))
    return min((_time([make() for _ in range(sets)], seconds), name) for name, make in kernels(product))


def _time(calls: Sequence[Call], seconds: float) -> float:
    for call in calls:
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - start)
    return median(times)


@dataclass
class Need:
    """Time that the products of some steps need, measured in one place in time.

    Args:
        tokens: Real tokens of those steps.
        seconds: By group: forward, gradient, lora, head, attention.
        kernels: The fastest kernel of each product that was measured.
    """

    tokens: int
    seconds: dict[str, float]
    kernels: dict[str, str]


def measure_need(model: ModelShape, batches: Sequence[BatchShape]) -> Need:
    """Time every product of these batches at its best kernel."""
    seconds = dict.fromkeys(("forward", "gradient", "lora", "head", "attention"), 0.0)
    chosen: dict[str, str] = {}
    for batch in batches:
        for product, count in step_products(model, batch).items():
            best, name = best_kernel(product)
            seconds[product.group] += count * best
            chosen[f"{product.group} {product.batch or 1}x{product.m}x{product.k}x{product.n}"] = name
    return Need(sum(batch.tokens for batch in batches), seconds, chosen)
