"""Keeps the books of a pass on the meta device: memory held, operations, bytes moved.

Tensors there have shapes and no values, so the pass of a model of any size takes seconds and no memory, while
everything that a real pass would allocate is allocated, and let go, in the same order.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Which of a product's arguments is its left matrix; the right one follows."""

_FLASH = _ATEN._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Product:
    """The shape of a matrix product: ``batch`` times ``(rows, inner)·(inner, columns)``.

    Attributes:
        batch: How many are computed in one call.
        rows: Of the left matrix.
        inner: Columns of the left matrix.
        columns: Of the right matrix.
        laid_out: Whether the right matrix is a frozen weight that is laid out for its products.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    laid_out: bool


class Ledger(TorchDispatchMode):
    """What happens within a ``with`` block.

    Args:
        weights: Tensors that are there before; they are not counted.
        vocabulary: Tensors that are so wide are logits, and counted apart.
        laid_out: Those of the weights that are laid out for their products.

    Attributes:
        live: Bytes that are held now.
        peak: Most bytes that were held.
        logits_at_peak: How many of those were logits.
        flops: Operations of matrix products and attention.
        products: How many of them each shape of product has.
        traffic: Bytes read and written by everything else.
        calls: Kernels called.
    """

    def __init__(self, weights: Sequence[Tensor], vocabulary: int, laid_out: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = Counter[Product]()
        self._laid_out = {_identity(tensor) for tensor in laid_out}
        self.live = self.peak = self.logits_at_peak = self.flops = self.traffic = self.calls = 0
        self._vocabulary, self._logits = vocabulary, 0
        self._known = {_identity(tensor) for tensor in weights}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do it, and write down what it took."""
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        new = [self._hold(one) for one in made]
        count = _formula(function.overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=out)
            self.flops += flops
            self.calls += 1
            if (first := _FACTORS.get(function.overloadpacket.__name__.rstrip("_"))) is not None:
                self.products[self._product(*args[first : first + 2])] += flops
        elif any(new) or function._schema.is_mutable:
            read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            self.traffic += sum(one.numel() * one.element_size() for one in (*read, *made))
            self.calls += 1
        return out

    def _product(self, left: Tensor, right: Tensor) -> Product:
        batch = left.shape[0] if left.ndim == 3 else 1
        (rows, inner), columns = left.shape[-2:], right.shape[-1]
        return Product(batch, rows, inner, columns, _identity(right) in self._laid_out)

    def _hold(self, tensor: Tensor) -> bool:
        """Count a tensor's memory, if it is new, until nobody holds it."""
        storage = tensor.untyped_storage()
        key = _identity(tensor)
        if key in self._known:
            return False
        logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
        size = storage.nbytes()
        self._known.add(key)
        self._change(size, logits)
        weakref.finalize(storage, self._let_go, key, size, logits)
        return True

    def _let_go(self, key: int, size: int, logits: bool) -> None:
        self._known.discard(key)
        self._change(-size, logits)

    def _change(self, size: int, logits: bool) -> None:
        self.live += size
        self._logits += size if logits else 0
        if self.live > self.peak:
            self.peak, self.logits_at_peak = self.live, self._logits


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _formula(packet: Any) -> Callable[..., int] | None:
    """How many operations a product takes; none for what is no product. One in place counts as the one it is."""
    if packet in _ATTENTION:
        return _ATTENTION[packet]
    known = flop_registry.get(packet)
    if known is None and packet.__name__.endswith("_"):
        known = flop_registry.get(getattr(_ATEN, packet.__name__.rstrip("_"), None))
    return known


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_ATTENTION: dict[Any, Callable[..., int]] = {
    _FLASH: _flash,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


_GROUPED = [one for one in (getattr(nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if one]
"""Products of experts, for which the meta device wants bfloat16."""


class NoValues(TorchFunctionMode):
    """Lets models that look at values run without any: nothing is true, and attention is a flash kernel's.

    Masks are built where "are all of these one?" is answered with no, and attention without a kernel for the meta
    device would be counted with all its scores, as no real one holds them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for what needs values."""
        kwargs = kwargs or {}
        if function is Tensor.__bool__ and args[0].is_meta:
            return False
        if function is Tensor.cpu and args[0].is_meta:
            return args[0]
        if function in _GROUPED and args[0].is_meta:  # each row meets one of the matrices, whichever
            return args[0] @ args[1][0]
        if function is nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return _flash_attention(*args, **kwargs)
        return function(*args, **kwargs)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    groups = query.shape[-3] // key.shape[-3]
    key, value = (one.repeat_interleave(groups, dim=-3) if groups > 1 else one for one in (key, value))
    out: Tensor = _FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]
    return out
