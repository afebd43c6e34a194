"""Learning rates against transformers' own schedulers."""

import pytest
import torch
from transformers import get_scheduler

from lorafleet.config.training import TrainingConfig
from lorafleet.training.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_equal_transformers(kind: str, warmup: int) -> None:
    config = TrainingConfig(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate(config, step, 40) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_warmup_ratio_rounds_up_and_steps_replace_it() -> None:
    assert warmup_steps(TrainingConfig(warmup_ratio=0.03), 34) == 2
    assert warmup_steps(TrainingConfig(warmup_ratio=0.03, warmup_steps=5), 34) == 5
    assert learning_rate(TrainingConfig(learning_rate=3e-4), 0, 1) == 3e-4  # a run of one step learns
