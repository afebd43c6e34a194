"""PEFT's methods in the population's loop equal a plain padded loop over PEFT's own model on the same rows."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.errors import AdapterError, ConfigError, RoutingError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import Routing
from lorafleet.lora.slots import answering
from lorafleet.methods.peft_method import PeftMethod
from lorafleet.methods.peft_options import peft_config, peft_types, prepends
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from tests.evaluation.test_token_loss import Row, make_rows
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "ia3": {},
    "vera": {"r": 4},
    "oft": {"oft_block_size": 8, "target_modules": ["q_proj", "down_proj"]},
    "loha": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "lokr": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "hra": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "fourierft": {"n_frequency": 10, "target_modules": ["q_proj", "v_proj"]},
    "ln_tuning": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
}
IDS = torch.tensor([[5, 9, 200, 33, 71, 400, 3, 18]])
ROWS = make_rows(3, (7, 5, 9, 6), prompt=3)


def padded_loss(model: torch.nn.Module, rows: list[Row]) -> Tensor:
    """Mean loss of the targets of right-padded rows, by transformers' own labels."""
    longest = max(len(row.input_ids) for row in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        ids[number, :length], mask[number, :length] = torch.as_tensor(row.input_ids).long(), 1
        labels[number, :length] = torch.where(torch.as_tensor(row.loss_mask), ids[number, :length], -100)
    labels[:, 0] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def logits_of(method: PeftMethod, ids: Tensor) -> Tensor:
    model = answering(method.model, method)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_padded_loop_over_peft(kind: str) -> None:
    method = PeftMethod(tiny_model("llama"), peft_config(kind, KINDS[kind]), seed=5)
    start = method.state_dict(0)
    trained = {name: one.value.clone() for name, one in method.slot_parameters(0).items()}
    values = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
    training = TrainingConfig(**values, per_device_train_batch_size=4, max_steps=4)
    member = Member(kind, method, 0, training, ROWS)
    run = RunConfig(output_dir="unused", save_strategy="no")
    Population([member], LossModel(method.model, method, 0), method, run).train()

    model = peft.get_peft_model(tiny_model("llama"), peft_config(kind, KINDS[kind])).eval()
    peft.set_peft_model_state_dict(model, start)
    model.load_state_dict(trained, strict=False)  # p-tuning's file does not hold the network that it trains
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(4):
        optimizer.zero_grad()
        padded_loss(model, ROWS).backward()
        optimizer.step()
    wanted = peft.get_peft_model_state_dict(model)
    found = method.state_dict(0)
    assert found.keys() == wanted.keys()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in found.items())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-3)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(method, IDS), model(IDS).logits[:, -8:], rtol=2e-3, atol=2e-3)
    again = PeftMethod(tiny_model("llama"), peft_config(kind, KINDS[kind]), seed=6)
    again.load_state_dict(0, found)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(again, IDS), logits_of(method, IDS), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), method.disabled():
        assert torch.equal(logits_of(method, IDS), tiny_model("llama")(IDS).logits)


def test_dropout_follows_from_the_routing() -> None:
    method = PeftMethod(tiny_model("llama"), peft_config("vera", {"r": 4, "vera_dropout": 0.5}), seed=5)
    for name, one in method.slot_parameters(0).items():
        if "lambda_b" in name:
            one.value.fill_(1)

    def logits(key: int) -> Tensor:
        with torch.no_grad(), method.route(Routing((0,), (8,), dropout_keys=(key,))):
            return method.model(IDS).logits

    assert torch.equal(logits(1), logits(2))
    assert not method.drops(0)
    method.train()
    assert method.drops(0)
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not any(m.training for m in method.model.modules() if type(m).__name__ == "LlamaAttention")


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'prefx' is unknown to PEFT; did you mean 'prefix'\?"):
        peft_config("prefx", {})
    with pytest.raises(ConfigError, match=r"(?s)num_virtual_token is no option of prefix; did you mean.*rank is no"):
        peft_config("prefix", {"num_virtual_token": 3, "rank": 2})
    with pytest.raises(ConfigError, match="AdaLoRA: it moves ranks"):
        peft_config("AdaLoRA", {})
    with pytest.raises(ConfigError, match="IA3 does not fit .*Phi.*target_modules"):
        PeftMethod(tiny_model("phi"), peft_config("ia3", {"target_modules": ["nowhere"], "feedforward_modules": []}))
    assert "ia3" in peft_types() and "prefix" in peft_types() and "adalora" not in peft_types()
    assert prepends(peft_config("prompt", {"num_virtual_tokens": 4}))
    method = PeftMethod(tiny_model("llama"), peft_config("ia3", {}))
    with (
        pytest.raises(RoutingError, match=r"slot 0 or of the base, not of \[-1, 0\]"),
        method.route(Routing((0, -1), (3, 4))),
    ):
        pass
    state = method.state_dict(0)
    first = state.pop(next(iter(state)))
    with pytest.raises(AdapterError, match=r"missing base_model.model.model.layers.0"):
        method.load_state_dict(0, state | {"more": first})
