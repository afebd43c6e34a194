"""Gradient checkpointing: keep only the input of each block and compute its inside again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafleet.errors import ConfigError
from lorafleet.lora import LoraBank


def recompute_blocks(model: nn.Module, bank: LoraBank) -> None:
    """Checkpoint every block of ``model``; recomputation re-uses the routing of its forward pass.

    transformers' own switch works in ``train()`` only, which would turn the base's dropout on.

    Raises:
        ConfigError: The model has no blocks that can be checkpointed.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} has no blocks to recompute; leave it off")
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, bank)


def _recomputed(forward: Callable[..., Any], bank: LoraBank, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=bank.checkpoint_contexts, **kwargs)
