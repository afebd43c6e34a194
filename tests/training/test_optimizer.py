"""AdamW over one adapter's tensors, against a plain loop over PEFT's model with its groups for LoRA+."""

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import inject_lora
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from tests.evaluation.test_token_loss import make_rows, plain_losses
from tests.tiny import tiny_model

RATE = 1e-3


@pytest.mark.parametrize(("ratio", "dora"), [(1.0, False), (16.0, False), (1.0, True), (16.0, True)])
def test_lora_plus_and_dora_train_as_in_peft(ratio: float, dora: bool) -> None:
    rows = make_rows(3, (7, 5, 9, 6))
    training = TrainingConfig(
        learning_rate=RATE,
        loraplus_lr_ratio=ratio,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0,
        per_device_train_batch_size=4,
        max_steps=6,
    )
    model = tiny_model("llama", torch.float64)
    ours = LoraConfig(r=2, bias="lora_only", use_dora=dora, target_modules=["q_proj", "down_proj"])
    bank = inject_lora(model, ours, seed=1)
    start = bank.state_dict(0)
    member = Member("adapter", bank, 0, training, rows)
    Population([member], LossModel(model, bank, 0), bank, RunConfig(output_dir="unused", save_strategy="no")).train()

    shape: dict[str, Any] = {"r": 2, "lora_alpha": 16, "bias": "lora_only", "use_dora": dora}
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **shape)
    theirs = peft.get_peft_model(tiny_model("llama", torch.float64), config).double().eval()
    peft.set_peft_model_state_dict(theirs, start)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio)
    for _ in range(6):
        loss = torch.stack(plain_losses(theirs, rows)).sum() / sum(int(row.loss_mask[1:].sum()) for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    wanted = peft.get_peft_model_state_dict(theirs)
    trained = bank.state_dict(0)
    assert trained.keys() == wanted.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(tensor, start[name])
