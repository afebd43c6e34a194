"""Full fine-tuning in the population's loop equals a plain loop over the model with PyTorch's own AdamW."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.errors import AdapterError, ModelError, RoutingError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import Routing
from lorafleet.methods.full import FullModel, dropout_keys
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from tests.evaluation.test_token_loss import make_rows, plain_losses
from tests.tiny import ARCHITECTURES, tiny_config, tiny_model

ROWS = make_rows(3, (7, 5, 9, 6), prompt=3)
STEPS = 5


def training(**knobs: Any) -> TrainingConfig:
    values: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    values |= {"per_device_train_batch_size": 4, "max_steps": STEPS, "max_grad_norm": 0.5, "weight_decay": 0.1}
    return TrainingConfig(**(values | knobs))


def without_dropout(arch: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_model(arch, dtype, **dict.fromkeys(dropout_keys(tiny_config(arch)), 0.0))


def train(model: PreTrainedModel, **knobs: Any) -> dict[str, Tensor]:
    full = FullModel(model)
    member = Member("full", full, 0, training(**knobs), ROWS)
    run = RunConfig(output_dir="unused", save_strategy="no")
    loss_model = LossModel(model, full, 0)
    loss_model.speed_up()
    Population([member], loss_model, full, run).train()
    return full.state_dict(0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_a_plain_loop(arch: str) -> None:
    trained = train(without_dropout(arch, torch.float64))
    model = without_dropout(arch, torch.float64).requires_grad_(True)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    targets = sum(int(row.loss_mask[1:].sum()) for row in ROWS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (torch.stack(plain_losses(model, ROWS)).sum() / targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    wanted = dict(model.named_parameters())
    assert trained.keys() == wanted.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, wanted[name].detach(), rtol=1e-5, atol=1e-7)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trained.items())


@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_dropout_follows_from_the_seed(arch: str) -> None:
    torch.manual_seed(1)
    first = train(tiny_model(arch))
    torch.manual_seed(2)
    second, other = train(tiny_model(arch)), train(tiny_model(arch), seed=7)
    still = train(without_dropout(arch))
    name = max(first, key=lambda n: first[n].numel())
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], still[name])


def test_micro_batches_change_nothing() -> None:
    whole = train(tiny_model("llama", torch.float64))
    parts = train(tiny_model("llama", torch.float64), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for name, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-7)


def test_what_does_not_fit_is_named() -> None:
    full = FullModel(tiny_model("llama"))
    with (
        pytest.raises(RoutingError, match="slot 0 alone, not -1; measure the base before"),
        full.route(Routing((0, -1), (3, 4))),
    ):
        pass
    state = full.state_dict(0)
    norm = state.pop("model.norm.weight")
    with pytest.raises(AdapterError, match=r"(?s)missing model.norm.weight.*surplus model.norm.weigth.*mean"):
        full.load_state_dict(0, state | {"model.norm.weigth": norm})
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(512, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="1 weights are quantized, the first is lm_head.weight"):
        FullModel(model)
