"""AdamW over one adapter's tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafleet.config.training import TrainingConfig


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), by PyTorch's own fused kernel.

    ``torch.optim.AdamW`` calls the same kernel, but counts the steps of each tensor and looks each one up anew. For the
    hundreds of small tensors of an adapter that took longer than the arithmetic. The moments exist from the start, so
    that they do not come to lie between the activations of the first step.

    Args:
        tensors: What it changes.
        config: Betas, epsilon and weight decay.
        ratios: Each tensor's learning rate over the one that a step is given; all 1 where None.
    """

    def __init__(
        self, tensors: Sequence[Tensor], config: TrainingConfig, ratios: Sequence[float] | None = None
    ) -> None:
        self.tensors, self.config = list(tensors), config
        self.exp_avg = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.exp_avg_sq = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.steps = torch.zeros((), dtype=torch.float32, device=self.tensors[0].device)
        self._groups: dict[float, list[int]] = {}
        for number, ratio in enumerate(ratios or [1.0] * len(self.tensors)):
            self._groups.setdefault(ratio, []).append(number)

    def step(self, grads: Sequence[Tensor], rate: float) -> None:
        """Change the tensors by their gradients at this learning rate."""
        config = self.config
        self.steps += 1
        for ratio, group in self._groups.items():
            torch._fused_adamw_(
                [self.tensors[i] for i in group],
                [grads[i] for i in group],
                [self.exp_avg[i] for i in group],
                [self.exp_avg_sq[i] for i in group],
                [],
                [self.steps] * len(group),
                lr=rate * ratio,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                weight_decay=config.weight_decay,
                eps=config.adam_epsilon,
                amsgrad=False,
                maximize=False,
            )
