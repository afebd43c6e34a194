"""BitFit in the population's loop equals a plain loop that trains the model's own biases."""

import pytest
import torch
from torch import Tensor

from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.errors import AdapterError, ModelError, RoutingError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import Routing
from lorafleet.methods.bitfit import BiasSlots
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from tests.evaluation.test_token_loss import make_rows, plain_losses
from tests.tiny import tiny_model

WITH_BIASES = ("qwen2", "phi", "gpt2", "opt", "gpt_neox")
IDS = torch.tensor([[5, 9, 200, 33, 71, 400, 3, 18]])
ROWS = [make_rows(seed, (7, 5, 9, 6), prompt=3) for seed in (3, 4)]


def training(rate: float) -> TrainingConfig:
    values = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.5}
    return TrainingConfig(**values, learning_rate=rate, per_device_train_batch_size=4, max_steps=4)


def plain(arch: str, number: int, rate: float) -> dict[str, Tensor]:
    model = tiny_model(arch, torch.float64).requires_grad_(False)
    biases = {name: p.requires_grad_() for name, p in model.named_parameters() if name.endswith(".bias")}
    # No weight decay, under which a bias would shrink to zero and its change to the base's.
    optimizer = torch.optim.AdamW(biases.values(), lr=rate, weight_decay=0)
    for _ in range(4):
        optimizer.zero_grad()
        targets = sum(int(row.loss_mask[1:].sum()) for row in ROWS[number])
        (torch.stack(plain_losses(model, ROWS[number])).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(biases.values(), 0.5)
        optimizer.step()
    return {name: p.detach() for name, p in biases.items()}


@pytest.mark.parametrize("arch", WITH_BIASES)
def test_two_slots_train_as_two_plain_loops(arch: str) -> None:
    slots = BiasSlots(tiny_model(arch, torch.float64), 2)
    rates = (1e-2, 3e-3)
    members = [Member(f"m{n}", slots, n, training(rate), ROWS[n]) for n, rate in enumerate(rates)]
    run = RunConfig(output_dir="unused", save_strategy="no")
    Population(members, LossModel(slots.model, slots, 0), slots, run).train()
    for number, rate in enumerate(rates):
        wanted = plain(arch, number, rate)
        found = slots.state_dict(number)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-7)
    with torch.no_grad(), slots.disabled():
        assert torch.equal(slots.model(IDS).logits, tiny_model(arch, torch.float64)(IDS).logits)


@pytest.mark.parametrize("arch", WITH_BIASES)
def test_biases_come_back(arch: str) -> None:
    slots = BiasSlots(tiny_model(arch))
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in slots.state_dict(0).items()}
    slots.load_state_dict(0, state)
    for name, tensor in slots.state_dict(0).items():
        torch.testing.assert_close(tensor, state[name])
    model = tiny_model(arch)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(slots.model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ModelError, match="has no biases, so bitfit has nothing to train"):
        BiasSlots(tiny_model("llama"))
    slots = BiasSlots(tiny_model("gpt2"), 2)
    with pytest.raises(RoutingError, match=r"names slots \[2\]; there are 2"):
        slots.route(Routing((0, 2), (3, 4)))
    with pytest.raises(AdapterError, match="there is no slot 2"):
        slots.state_dict(2)
    state = slots.state_dict(0)
    state.pop("transformer.ln_f.bias")
    with pytest.raises(AdapterError, match=r"missing transformer.ln_f.bias \(32,\)"):
        slots.load_state_dict(0, state)
