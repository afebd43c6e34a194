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
    """

    def __init__(self, tensors: Sequence[Tensor], config: TrainingConfig) -> None:
        self.tensors, self.config = list(tensors), config
        self.exp_avg = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.exp_avg_sq = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.steps = torch.zeros((), dtype=torch.float32, device=self.tensors[0].device)

    def step(self, grads: Sequence[Tensor], rate: float) -> None:
        """Change the tensors by their gradients at this learning rate."""
        config = self.config
        self.steps += 1
        torch._fused_adamw_(
            self.tensors,
            list(grads),
            self.exp_avg,
            self.exp_avg_sq,
            [],
            [self.steps] * len(self.tensors),
            lr=rate,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            weight_decay=config.weight_decay,
            eps=config.adam_epsilon,
            amsgrad=False,
            maximize=False,
        )
