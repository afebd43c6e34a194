"""Layers that read the same tensor compute together and answer as each alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.lora import LoraBank, Routing, inject_lora
from tests.lora.test_bank import IDS, fill
from tests.tiny import tiny_model


def prepared(arch: str, fast: bool, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[Any, LoraBank]:
    model = tiny_model(arch, dtype)
    bank = inject_lora(model, [LoraConfig(r=2, **config), LoraConfig(r=3, target_modules="attention")])
    for slot in range(2):
        fill(bank, slot, seed=slot)
    if fast:
        bank.speed_up(lambda: model(input_ids=IDS))
    return model, bank


def groups(bank: LoraBank) -> set[tuple[str, ...]]:
    found = {layer.shared_input for layer in bank.layers.values()} - {None}
    names = {id(layer): path.rpartition(".")[2] for path, layer in bank.layers.items()}
    return {tuple(names[id(layer)] for layer in group.layers) for group in found}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("opt", {("q_proj", "k_proj", "v_proj")}),
        ("gpt2", set()),
    ],
)
def test_which_layers_share_their_input(arch: str, expected: set[tuple[str, ...]]) -> None:
    _, bank = prepared(arch, fast=True)
    assert {tuple(sorted(group)) for group in groups(bank)} == {tuple(sorted(group)) for group in expected}


@pytest.mark.parametrize("routing", [None, Routing((0, 1), (12, 12)), Routing((1, 0, -1), (5, 10, 9))])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "phi"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_logits_and_gradients_are_those_of_single_layers(
    arch: str, routing: Routing | None, dtype: torch.dtype, tolerance: float
) -> None:
    def run(fast: bool) -> list[Tensor]:
        model, bank = prepared(arch, fast, dtype)
        assert fast == any(layer.packed is not None for layer in bank.layers.values()) or dtype == torch.float64
        assert IDS.numel() == 24
        with bank.router.using(routing):
            logits = model(input_ids=IDS).logits
            logits.square().mean().backward()
        with bank.disabled(), torch.no_grad():
            base = model(input_ids=IDS).logits
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [logits.detach(), base, *grads]

    for got, wanted in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance / 10)


def test_dropout_keeps_each_layers_own_mask() -> None:
    def run(fast: bool) -> Tensor:
        model, bank = prepared("llama", fast, lora_dropout=0.5)
        bank.train()
        with bank.route(Routing((0,), (24,), dropout_keys=(7,))):
            return model(input_ids=IDS).logits  # type: ignore[no-any-return]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_what_waits_is_for_the_same_input_and_routing_only() -> None:
    _, bank = prepared("llama", fast=True)
    q, k = (bank.layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    x = torch.randn(4, q.in_features, dtype=torch.float64)
    with torch.no_grad():
        expected = [k.base_layer(x) + x @ k.delta(slot).T for slot in range(2)]
        for slot in range(2):
            with bank.route(Routing((slot,), (4,))):
                q(x)
            with bank.route(Routing((1 - slot,), (4,))):
                torch.testing.assert_close(k(x), expected[1 - slot])
        q(x)
        x.mul_(2)
        torch.testing.assert_close(k(x), 2 * expected[0])
        torch.testing.assert_close(k(x), 2 * expected[0])
    q(x)
    assert k(x.clone()).requires_grad


def test_a_model_converted_afterwards_answers_in_its_new_precision() -> None:
    def run(fast: bool) -> Tensor:
        model, bank = prepared("llama", fast, torch.float32)
        with bank.route(Routing((0, 1), (12, 12))), torch.no_grad():
            return model.double()(input_ids=IDS).logits  # type: ignore[no-any-return]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_inference_mode_and_autocast_see_what_changed_between_two_layers() -> None:
    _, bank = prepared("llama", True, torch.float32)
    q, k = (bank.layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    with torch.inference_mode():
        x = torch.randn(4, q.in_features)
        q(x)
        x.mul_(2)
        torch.testing.assert_close(k(x), k(x.clone()))
    x = torch.randn(4, q.in_features)
    q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert k(x).dtype == torch.bfloat16
