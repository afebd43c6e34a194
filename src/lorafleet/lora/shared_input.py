"""Layers that read the same tensor: q, k and v of an attention block, gate and up of a gated MLP.

A model calls them one after the other. Computed together when the first is called, the rank-wide products read the
input once, and the base's gradients of the input are summed inside the products.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lorafleet.lora.joint import JointWeight, join_weights, outputs
from lorafleet.lora.layer import LoraLinear


class SharedInput:
    """Answers for layers that read the same tensor; what the later ones will ask for waits until they do.

    Between the first layer's call and the last one's, nobody may change weights: that would not be seen.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self._input: ReferenceType[Tensor] | None = None
        self._state: tuple[object, ...] = ()
        self._changes = 0
        self._waiting: dict[int, Tensor] = {}
        self.joint: JointWeight | None = None

    def pack(self) -> None:
        """Lay the layers' weights out as one, for answering without gradients."""
        self.joint = join_weights(self.layers)
        self.layers[0].router.version += 1  # plans know where outputs lie, which are columns of one tensor now

    def __call__(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """``layer``'s output for ``x (..., in)``; those with dropout have masks of their own and compute alone."""
        router, lower = layer.router, torch.is_autocast_enabled(x.device.type) if x.device.type != "meta" else False
        state = (router.routing, router.enabled, torch.is_grad_enabled(), layer.training, lower)
        if self._input is not None and self._input() is x and self._state == state and not x.is_inference():
            waiting = self._waiting.pop(id(layer), None)
            if waiting is not None and self._changes == x._version:
                return waiting
        # Tensors of inference mode do not say when they were changed.
        if x.is_inference() or self._drops:
            return outputs([layer], x)[0]
        self._waiting = dict(zip(map(id, self.layers), outputs(self.layers, x, self.joint), strict=True))
        self._input, self._state, self._changes = ref(x), state, x._version
        return self._waiting.pop(id(layer))

    def answers(self, x: Tensor) -> list[Tensor]:
        """Every layer's output for ``x (..., in)``."""
        return [outputs([layer], x)[0] for layer in self.layers] if self._drops else outputs(self.layers, x, self.joint)

    @property
    def _drops(self) -> bool:
        return any(one.training and any(one.dropouts) for one in self.layers)


def share_inputs(layers: Sequence[LoraLinear], run: Callable[[], object]) -> list[SharedInput]:
    """Find the layers that read the same tensor by running the model once, and let them compute together."""
    calls: list[tuple[LoraLinear, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0]))) for layer in layers
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for _, group in groupby(calls, key=lambda call: id(call[1])):
        together = [layer for layer, _ in group]
        once = all(sum(layer is called for called, _ in calls) == 1 for layer in together)
        if len(together) > 1 and once:
            found.append(SharedInput(together))
            for layer in together:
                layer.shared_input = found[-1]
    return found
