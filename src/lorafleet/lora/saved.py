"""What an adapter trains besides A and B: whole modules (``modules_to_save``) and biases."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafleet.errors import AdapterError
from lorafleet.lora.routing import Router


class SlotModule(nn.Module):
    """A module of which slots may hold a trained copy; tokens of the other slots go through the original."""

    def __init__(self, original: nn.Module, router: Router) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.router = router
        self.copies = nn.ModuleDict()

    def add(self, slot: int) -> None:
        """Give the slot a trainable copy of the original."""
        clone = copy.deepcopy(self.original).requires_grad_(True)
        dtype = torch.promote_types(next(self.original.parameters()).dtype, torch.float32)
        self.copies[str(slot)] = clone.to(dtype)

    def clear(self, slot: int) -> None:
        """Forget the slot's copy."""
        if str(slot) in self.copies:
            del self.copies[str(slot)]

    def _module(self, slot: int) -> nn.Module:
        return dict(self.copies.items()).get(str(slot), self.original)

    def _call(self, module: nn.Module, x: Tensor) -> Tensor:
        dtype = next(self.original.parameters()).dtype
        if module is self.original or x.dtype != dtype:
            return cast(Tensor, module(x))
        return cast(Tensor, module(x.to(next(module.parameters()).dtype))).to(dtype)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Send each segment of ``x`` (ids ``(..., )`` or features ``(..., in)``) through its slot's module."""
        if kwargs:
            raise AdapterError(
                f"a module of modules_to_save was called with {', '.join(kwargs)}; only plain calls route"
            )
        router = self.router
        if not router.enabled:
            return cast(Tensor, self.original(x))
        tokens_shape = x.shape if not x.is_floating_point() else x.shape[:-1]
        if router.merged_slot is not None:
            return self._call(self._module(router.merged_slot), x)
        segments = router.segments(tokens_shape.numel())
        modules = [self._module(s.slot) for s in segments]
        if all(module is modules[0] for module in modules):
            return self._call(modules[0], x)
        flat = x.reshape(-1, *x.shape[len(tokens_shape) :])
        parts = [self._call(m, flat[s.start : s.stop]) for m, s in zip(modules, segments, strict=True)]
        return torch.cat(parts).view(*tokens_shape, -1)


class SlotBias(nn.Module):
    """Each slot's change of a module's bias, ``(K, out)``, added to the module's output by a forward hook.

    A change that starts at zero trains as the bias itself would: ``∂L/∂(b + c) = ∂L/∂c``.
    """

    def __init__(self, owner: nn.Module, num_slots: int, router: Router) -> None:
        super().__init__()
        bias = cast(Tensor, owner.bias)
        self.router = router
        self._owner = [owner]  # in a list, so that the owner does not become a child of its own child
        dtype = torch.promote_types(bias.dtype, torch.float32)
        self.change = nn.Parameter(bias.new_zeros((num_slots, *bias.shape), dtype=dtype))
        self.slots = set[int]()
        owner.register_forward_hook(self._hook)
        owner.add_module("lora_bias", self)

    @property
    def bias(self) -> Tensor:
        """The base's own bias."""
        return cast(Tensor, self._owner[0].bias)

    def grow(self, num_slots: int) -> None:
        """Make room for more slots."""
        missing = num_slots - self.change.shape[0]
        if missing > 0:
            zeros = self.change.new_zeros((missing, *self.change.shape[1:]))
            self.change = nn.Parameter(torch.cat([self.change.data, zeros]))

    def clear(self, slot: int) -> None:
        """Set the slot's change to zero and stop training it."""
        self.slots.discard(slot)
        with torch.no_grad():
            self.change[slot].zero_()
            if self.change.grad is not None:
                self.change.grad[slot].zero_()

    def _hook(self, _owner: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        router = self.router
        if not router.enabled:
            return output
        width = output.shape[-1]
        if router.merged_slot in self.slots:
            return output + self.change[router.merged_slot].to(output.dtype)
        if router.merged_slot is not None:
            return output
        flat = output.reshape(-1, width)
        parts = [
            flat[s.start : s.stop] + self.change[s.slot].to(output.dtype)
            if s.slot in self.slots
            else flat[s.start : s.stop]
            for s in router.segments(flat.shape[0])
        ]
        return torch.cat(parts).view(output.shape)
