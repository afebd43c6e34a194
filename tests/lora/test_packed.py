"""Packed weights give the products of the plain ones, and train the same adapter up to rounding."""

import pytest
import torch

from lorafleet.config.lora import LoraConfig
from lorafleet.lora import inject_lora
from lorafleet.lora.packed import pack
from tests.lora.test_bank import IDS, fill
from tests.tiny import tiny_model


def test_products_in_both_directions() -> None:
    weight = torch.randn(24, 16)
    packed = pack(weight)
    assert packed is not None, "this PyTorch has no oneDNN operators to pack with; lorafleet works, but slower"
    x, grad, bias = torch.randn(9, 16), torch.randn(9, 24), torch.randn(24)
    torch.testing.assert_close(packed.linear(x, bias), x @ weight.T + bias)
    torch.testing.assert_close(packed.input_gradient(grad), grad @ weight)


def test_other_precisions_and_trainable_weights_are_not_packed() -> None:
    assert pack(torch.randn(4, 4, dtype=torch.float64)) is None
    assert pack(torch.randn(4, 4, requires_grad=True)) is None


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_a_packed_bank_gives_the_same_logits_and_gradients(arch: str) -> None:
    def run(packed: bool) -> list[torch.Tensor]:
        model = tiny_model(arch)
        bank = inject_lora(model, [LoraConfig(r=2), LoraConfig(r=3, target_modules="attention")])
        for slot in range(2):
            fill(bank, slot, seed=slot)
        if packed:
            bank.pack()
            assert all(layer.packed is not None for layer in bank.layers.values())
        logits = model(input_ids=IDS).logits
        logits.square().mean().backward()
        with bank.disabled(), torch.no_grad():
            base = model(input_ids=IDS).logits
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [logits.detach(), base, *grads]

    for got, wanted in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
