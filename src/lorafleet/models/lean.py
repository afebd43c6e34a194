"""The layers of Llama's family over a flat batch, without transformers' modules around the arithmetic.

A step of decoding is hundreds of small calls, and modules, their decorators and lookups took a third to a half of its
time beside the products; in training, norms and rotary positions here make fewer passes over memory. What is repeated
are rotary positions (Su et al. 2021, arXiv 2104.09864), a gated MLP (Shazeer 2020, arXiv 2002.05202) and RMS norms.
Embedding and projections stay the model's own modules.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lorafleet.lora.layer import LoraLinear
from lorafleet.lora.shared_input import SharedInput
from lorafleet.models.attention import FlatLayout, difference, flat_attention, flat_inputs
from lorafleet.models.cached_attention import CachedLayout, KeyValueCache

logger = logging.getLogger(__name__)

_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "transformers.models.llama.modeling_llama.LlamaModel": lambda attention: None,
    "transformers.models.mistral.modeling_mistral.MistralModel": lambda attention: attention.config.sliding_window,
    "transformers.models.qwen2.modeling_qwen2.Qwen2Model": lambda attention: attention.sliding_window,
    "transformers.models.qwen3.modeling_qwen3.Qwen3Model": lambda attention: attention.sliding_window,
}
"""How many tokens an attention module of each class sees."""

_SILU = type(ACT2FN["silu"])


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: its modules by name, looked up at each call as adapters replace them."""

    own: dict[str, Any]
    attention: Any
    mlp: dict[str, Any]
    window: int | None


class Wanted(NamedTuple):
    """Tokens whose last hidden states are asked for in one call; behind its attention the last layer computes no other.

    Args:
        tokens: ``(wanted,)``, their places in the batch.
        routing: Puts the routing of these tokens in force.
    """

    tokens: Tensor
    routing: AbstractContextManager[None]


class LeanLayers:
    """A decoder's forward for flat batches; as transformers' own, with other rounding.

    Where something listens between the modules that are gone around, or has replaced one, the decoder itself is called.

    Args:
        decoder: The part of a model before its head, of a class that ``lean`` knows.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.home = decoder, type(decoder).__module__
        window_of = _WINDOWS[_class_of(decoder)]
        self.layers = [_layer(layer, window_of) for layer in decoder.layers]
        places = [(decoder._modules, "layers"), *((decoder.layers._modules, name) for name in decoder.layers._modules)]
        places += [(layer.own, name) for layer in self.layers for name in ("self_attn", "mlp")]
        self._around = [(modules, name, modules[name]) for modules, name in places]

    @property
    def as_built(self) -> bool:
        """Whether the modules that are gone around are the model's, all of them, and nothing listens to them."""
        there = all(modules.get(name) is module and not _is_heard(module) for modules, name, module in self._around)
        counts = {len(self.layers), len(self.decoder.layers), self.decoder.config.num_hidden_layers}
        return there and len(counts) == 1 and not _is_heard(self.decoder)

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        flat_layout: FlatLayout | CachedLayout,
        wanted: Wanted | None = None,
        **rest: Any,
    ) -> tuple[Tensor]:
        """The last hidden states of a flat batch, ``(1, tokens, hidden)`` or ``(1, wanted, hidden)``.

        Args:
            input_ids: This one and the others as ``flat_inputs`` gives them.
            position_ids: See there.
            flat_layout: See there.
            wanted: Some of the tokens; all where None.
            rest: What the decoder takes besides.
        """
        if not self.as_built:
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "flat_layout": flat_layout}
            hidden = self.decoder(**inputs, **rest)[0]
            return (hidden if wanted is None else hidden.index_select(1, wanted.tokens),)
        x = self.decoder.embed_tokens(input_ids)
        cos, sin = (part[0][:, None] for part in self.decoder.rotary_emb(x, position_ids))
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        x = x[0]
        norm = self._norm_of(x)
        for layer in self.layers[:-1]:
            x = self._behind_attention(layer, x, self._attended(layer, x, cos, signed, flat_layout, norm), norm)
        last = self.layers[-1]
        heads = self._attended(last, x, cos, signed, flat_layout, norm)
        if wanted is not None:
            x, heads = x.index_select(0, wanted.tokens), heads.index_select(0, wanted.tokens)
        with wanted.routing if wanted is not None else nullcontext():
            return (norm(self.decoder.norm, self._behind_attention(last, x, heads, norm))[None],)

    def _norm_of(self, x: Tensor) -> Callable[[Any, Tensor], Tensor]:
        """How hidden states like ``x`` are normed, found out once for all layers: a step of decoding is short."""
        norms = [layer.own[name] for layer in self.layers for name in ("input_layernorm", "post_attention_layernorm")]
        own = all(type(norm).__module__ == self.home and not _is_heard(norm) for norm in [*norms, self.decoder.norm])
        return _rms_norm if own and x.dtype == torch.float32 and not torch.is_grad_enabled() else self._normed

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        """RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) in float32, as transformers has it."""
        # Transformers' norm rounds float64 to float32; float64 is for comparing with it.
        if type(norm).__module__ != self.home or _is_heard(norm) or x.dtype == torch.float64:
            return cast(Tensor, norm(x))
        if torch.is_grad_enabled():
            return _trained_rms_norm(x, norm.weight, norm.variance_epsilon)
        scaled = F.rms_norm(x.float(), x.shape[-1:], None, norm.variance_epsilon).to(x.dtype)
        return cast(Tensor, norm.weight * scaled)

    def _attended(
        self,
        layer: _Layer,
        x: Tensor,
        cos: Tensor,
        signed: Tensor,
        layout: FlatLayout | CachedLayout,
        norm: Callable[[Any, Tensor], Tensor],
    ) -> Tensor:
        """What attention gives tokens ``x (tokens, hidden)`` at the positions of ``cos (tokens, 1, dim)``, by head."""
        module, modules = layer.attention, layer.attention._modules
        x = norm(layer.own["input_layernorm"], x)
        projections = _together([modules["q_proj"], modules["k_proj"], modules["v_proj"]], x)
        q, k, v = (part.view(x.shape[0], -1, module.head_dim) for part in projections)
        if "q_norm" in modules:
            q, k = self._normed(modules["q_norm"], q), self._normed(modules["k_norm"], k)
        q, k = _turned(q, cos, signed), _turned(k, cos, signed)
        if isinstance(layout, CachedLayout):
            return layout.attend(module.layer_idx, q, k, v, module.scaling, layer.window).reshape(x.shape[0], -1)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        dropout = module.attention_dropout if module.training else 0.0
        out, _ = flat_attention(
            module, q, k, v, None, module.scaling, dropout, sliding_window=layer.window, flat_layout=layout
        )
        return out.reshape(x.shape[0], -1)

    def _behind_attention(
        self, layer: _Layer, x: Tensor, heads: Tensor, norm: Callable[[Any, Tensor], Tensor]
    ) -> Tensor:
        """The rest of a layer, token by token."""
        x = x + layer.attention._modules["o_proj"](heads)
        return x + _mlp(layer.mlp, norm(layer.own["post_attention_layernorm"], x))


def _layer(layer: Any, window_of: Callable[[Any], int | None]) -> _Layer:
    return _Layer(layer._modules, layer.self_attn, layer.mlp._modules, window_of(layer.self_attn))


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm of float32 without gradients, in one call."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """``y = w∘x·s``, ``s = 1/sqrt(mean(x²) + eps)``;  ``∂L/∂x = s·g - x·s³·mean(g∘x)`` for ``g = w∘∂L/∂y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        scaled = _scaled(x, scale)
        return scaled.mul_(weight) if scaled.dtype == weight.dtype else weight * scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        g = (grad * weight).float()
        along = (g * x).mean(dim=-1, keepdim=True).mul_(scale**3)
        of_weight = (grad * _scaled(x, scale)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return g.mul_(scale).addcmul_(x.float(), along, value=-1).to(x.dtype), of_weight, None


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale).to(x.dtype)


def _trained_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of ``x (…, n)``, in float32; backward in half the passes of plain autograd's."""
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _Turned(torch.autograd.Function):
    """:func:`_turned` in three passes over memory each way; turned back is turned by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed)
        return _halves_turned(x, cos, signed, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, signed = ctx.saved_tensors
        return _halves_turned(grad, cos, signed, -1), None, None


def _halves_turned(x: Tensor, cos: Tensor, signed: Tensor, sign: int) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    (first, second), (x1, x2), (sin1, sin2) = (part.split(half, dim=-1) for part in (out, x, signed))
    first.addcmul_(x2, sin1, value=sign)
    second.addcmul_(x1, sin2, value=sign)
    return out


def _turned(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """Rotary positions: ``x·cos + (-x2, x1)·sin`` for halves ``x1, x2``; the sign is in ``signed`` already."""
    if torch.is_grad_enabled():
        return cast(Tensor, _Turned.apply(x, cos, signed))  # type: ignore[no-untyped-call]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed)


class _GatedSilu(torch.autograd.Function):
    """``silu(gate)∘up``; silu is computed again in the backward pass: kept, it is a seventh of a layer's memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _mlp(modules: dict[str, Any], x: Tensor) -> Tensor:
    (gate, up), act = _together([modules["gate_proj"], modules["up_proj"]], x), modules["act_fn"]
    if torch.is_grad_enabled() and type(act) is _SILU and not _is_heard(act):
        gated = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    else:
        gated = act(gate) * up
    return cast(Tensor, modules["down_proj"](gated))


def _together(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What layers answer that read the same ``x``, in one call where they are prepared for that."""
    first = layers[0]
    shared = first.shared_input if isinstance(first, LoraLinear) and first.router.merged_slot is None else None
    if not isinstance(shared, SharedInput) or shared.layers != layers or any(map(_is_heard, layers)):
        return [layer(x) for layer in layers]
    return shared.answers(x)


def _is_heard(module: nn.Module) -> bool:
    """Whether somebody waits for a call of the module: hooks, or another forward in it."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__)


def _class_of(decoder: nn.Module) -> str:
    return f"{type(decoder).__module__}.{type(decoder).__qualname__}"


def lean(decoder: Callable[..., Any]) -> Callable[..., Any]:
    """The decoder's layers without their modules, if they are known and give the same; else the decoder.

    Args:
        decoder: The part of a model before its head.
    """
    if not isinstance(decoder, nn.Module) or _class_of(decoder) not in _WINDOWS:
        return decoder
    device = next(decoder.parameters()).device
    ids, found = torch.arange(5, device=device)[None], list[Tensor]()
    try:
        layers = LeanLayers(decoder)
        for body in (decoder, layers):
            layout = CachedLayout(KeyValueCache(2, 5), [1, 0], [0, 0], [1, 4]).to(device)
            positions = torch.tensor([layout.positions], device=device)
            found.append(body(**flat_inputs(ids, positions, layout))[0])
        reason = difference(*found) if layers.as_built else "something listens to them"
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # another release of transformers
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return layers
    logger.info("%s runs by its own modules (%s)", type(decoder).__name__, reason)
    return decoder
