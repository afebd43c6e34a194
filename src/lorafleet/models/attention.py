"""Attention over a flat batch: several sequences in one row, without padding and without a mask.

Hugging Face models look their attention up by name (``AttentionInterface``) and hand their keyword arguments on to
it, so the layout of the batch travels as an argument of the forward call. A causal mask would cost T² and turn off
native grouped-query attention; runs of equal length go through one ``scaled_dot_product_attention`` instead.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorafleet.lora.grouped_gemm import has_grouped_gemm
from lorafleet.models.cached_attention import CachedLayout, KeyValueCache
from lorafleet.models.shared_prompts import SharedPrompts, share_prompts
from lorafleet.models.short_attention import LONGEST, short_attention

logger = logging.getLogger(__name__)

FLAT = "lorafleet_flat"
"""The name under which the attention is registered with transformers."""

_IGNORED = {"position_ids", "cache", "past_key_values", "use_cache", "output_attentions", "position_embeddings"}


@dataclass(frozen=True, eq=False)
class FlatLayout:
    """The lengths of the sequences of a flat batch, in order. Equal lengths side by side share one product.

    Where sequences begin alike, ``shared`` says how the rest of the model, which computes that once, sees the batch.
    """

    lengths: tuple[int, ...]
    shared: SharedPrompts | None = None

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """``(start, count, length)`` of each run of equal lengths."""
        runs, start = [], 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)

    def bounds(self, device: torch.device) -> Tensor:
        """Cumulative lengths ``(sequences + 1,)`` as varlen kernels want them."""
        return torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)


class UnsupportedAttention(Exception):
    """The model asks its attention for something that the flat one does not do; the padded path does it."""


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    flat_layout: FlatLayout | CachedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a flat batch; without a layout, transformers' own SDPA.

    Args:
        module: The model's attention module.
        query: ``(1, heads, tokens, dim)``.
        key: ``(1, kv_heads, tokens, dim)``.
        value: ``(1, kv_heads, tokens, dim)``.
        attention_mask: Not used with a layout.
        scaling: Factor of the scores; 1/sqrt(dim) when not given.
        dropout: Of the scores.
        sliding_window: Tokens that a position sees, itself included.
        is_causal: The module's own setting when not given.
        flat_layout: Lengths of the sequences, and where what they go on from is kept.
        kwargs: Whatever else the model hands on.

    Returns:
        ``(1, tokens, heads, dim)`` and no weights.

    Raises:
        UnsupportedAttention: The model needs score caps, sinks, biases or attention both ways.
    """
    if flat_layout is None:
        passed = kwargs | {"sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **passed
        )
    foreign = sorted(name for name, given in kwargs.items() if given is not None and name not in _IGNORED)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if foreign or not causal:
        raise UnsupportedAttention(f"needs {', '.join(foreign) or 'non-causal attention'}")
    if isinstance(flat_layout, CachedLayout):
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return flat_layout.attend(module.layer_idx, q, k, v, scaling, sliding_window)[None], None  # type: ignore[arg-type]
    shared = flat_layout.shared
    if shared is None:
        return _attend(query, key, value, scaling, sliding_window, flat_layout, dropout), None
    q, k, v = (shared.expand(t[0].transpose(0, 1)).transpose(0, 1)[None] for t in (query, key, value))
    return shared.compact(_attend(q, k, v, scaling, sliding_window, flat_layout, dropout)[0])[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    layout: FlatLayout,
    dropout: float,
) -> Tensor:
    """Attention within each sequence, ``(1, tokens, heads, dim)``, by the fastest kernel that fits."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if dropout == 0 and query.is_cuda and half and varlen_kernel() is not None:
        return _varlen(query, key, value, scaling, sliding_window, layout)
    if dropout == 0 and _is_short(query, key, value, layout, sliding_window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return short_attention(query, key, value, scale, layout.runs).transpose(1, 2)
    gqa = query.shape[1] != key.shape[1]
    parts = []
    for start, count, length in layout.runs:
        q, k, v = (_rows(t, start, count, length) for t in (query, key, value))
        window = sliding_window is not None and sliding_window < length
        mask = _band(length, sliding_window, q.device) if window and sliding_window else None
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        parts.append(out.transpose(1, 2).reshape(count * length, *out.shape[1::2]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _is_short(query: Tensor, key: Tensor, value: Tensor, layout: FlatLayout, window: int | None) -> bool:
    longest = max(layout.lengths)
    return (
        has_grouped_gemm(query)
        and query.dtype == key.dtype == value.dtype  # autocast leaves them different
        and longest <= LONGEST
        and (window is None or window >= longest)
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
    )


def _rows(tensor: Tensor, start: int, count: int, length: int) -> Tensor:
    """A run of equal lengths as ``(count, heads, length, dim)``, a view."""
    rows: Tensor = tensor[0, :, start : start + count * length].unflatten(1, (count, length))
    return rows.transpose(0, 1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Causal mask ``(length, length)`` of a sliding window."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, layout: FlatLayout
) -> Tensor:
    """Flash attention's variable-length kernel; key and value heads are repeated, which every version of it takes."""
    kernel = varlen_kernel()
    assert kernel is not None
    bounds, longest, groups = layout.bounds(query.device), max(layout.lengths), query.shape[1] // key.shape[1]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    window_size = (-1 if window is None else window - 1, 0)
    out: Tensor = kernel(
        *(t.contiguous() for t in (q, k, v)), bounds, bounds, longest, longest, scale=scaling, window_size=window_size
    )
    return out[None]


@lru_cache
def varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, where this version has it with windows (2.11 on)."""
    try:
        kernel: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return kernel if "window_size" in signature(kernel).parameters else None


AttentionInterface.register(FLAT, flat_attention)
AttentionMaskInterface.register(FLAT, sdpa_mask)


def flat_inputs(input_ids: Tensor, position_ids: Tensor, layout: FlatLayout | CachedLayout) -> dict[str, Any]:
    """Arguments of a model's forward for the computed tokens ``(1, tokens)`` of a flat batch.

    An empty 4-D mask is handed through untouched by transformers' mask code, which would build a T² mask otherwise.
    """
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.empty((0, 0, 0, 0), device=input_ids.device),
        "use_cache": False,
        "flat_layout": layout,
    }


def use_flat_attention(model: PreTrainedModel) -> bool:
    """Switch a model to flat attention if that gives the same logits; leave it as it was if not.

    Two short sequences that begin alike are run in one flat row and each alone. Models outside transformers'
    attention interface, and those with score caps, sinks or recurrent layers, fail the comparison and keep their own.

    Returns:
        Whether flat batches work on this model.
    """
    before = model.config._attn_implementation
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[*range(4), 0, 1, *range(4, 9)]], device=device) % vocabulary
    positions = torch.tensor([[*range(4), *range(7)]], device=device)
    shared = share_prompts((4, 7), (0, 2))
    assert shared is not None
    shared = shared.to(device)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in ids.split([4, 7], dim=1)])
        try:
            model.set_attn_implementation(FLAT)
            inputs = flat_inputs(ids[:, shared.kept], positions[:, shared.kept], FlatLayout((4, 7), shared))
            together = model(**inputs).logits[0, shared.place]
            reason = difference(together, alone)
        except (UnsupportedAttention, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return True
    model.set_attn_implementation(before)
    logger.info("flat batches do not work on %s (%s); using padded batches", type(model).__name__, reason)
    return False


def use_cached_attention(model: PreTrainedModel) -> bool:
    """Switch a model to flat attention if it goes on from kept keys and values as well, with the same logits.

    A sequence is read in two pieces and then by one token, beside another that comes in later.

    Returns:
        Whether :class:`CachedLayout` works on this model.
    """
    if not use_flat_attention(model):
        return False
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device) % model.config.get_text_config().vocab_size
    cache = KeyValueCache(2, 8)
    with torch.no_grad():
        wanted = model(input_ids=ids[None], use_cache=False).logits[0, [6, 7, 2]]
        try:
            for rows, starts, lengths in ([[1], [0], [4]], [[1], [4], [2]], [[1, 0], [6, 0], [1, 3]], [[1], [7], [1]]):
                layout = CachedLayout(cache, rows, starts, lengths)
                positions = torch.tensor([layout.positions], device=device)
                logits = model(**flat_inputs(ids[positions[0]][None], positions, layout.to(device))).logits[0]
                if len(rows) == 2:
                    found = logits[[0, 3]]
            reason = difference(torch.cat([found[:1], logits[-1:], found[1:]]), wanted)
        except (UnsupportedAttention, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.info("flat decoding does not work on %s (%s); using padded batches", type(model).__name__, reason)
    return reason is None


def difference(together: Tensor, alone: Tensor) -> str | None:
    """How two results that should be the same differ beyond rounding; None where they do not."""
    if together.shape != alone.shape:
        return f"logits have shape {tuple(together.shape)}, not {tuple(alone.shape)}"
    if together.is_meta:
        return None  # no values to compare
    tolerance = 1e-4 if together.dtype in (torch.float32, torch.float64) else 5e-2
    relative = ((together - alone).abs().max() / alone.abs().max()).item()
    return None if relative <= tolerance else f"logits differ by {relative:.1e} relative"
