"""The learning rate as a function of the step. Equal to transformers' schedulers, but without state."""

import math

from lorafleet.config.training import TrainingConfig


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps in which the rate rises from 0; a ratio is rounded up, but leaves a step at the full rate."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(math.ceil(total_steps * config.warmup_ratio), total_steps - 1)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step ``step``, counted from 0.

    Linear warm-up, then constant, a straight line to 0, or half a cosine to 0.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    left = (total_steps - step) / max(1, total_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": max(0.0, left),
        "cosine": max(0.0, 0.5 * (1 + math.cos(math.pi * (1 - left)))),
    }
    return config.learning_rate * factor[config.lr_scheduler_type]
