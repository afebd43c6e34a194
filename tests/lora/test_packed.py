"""Packed weights give the products of the plain ones."""

import torch

from lorafleet.lora.packed import pack


def test_products_in_both_directions() -> None:
    weight = torch.randn(24, 16)
    packed = pack(weight)
    assert packed is not None, "this PyTorch has no oneDNN operators to pack with; lorafleet works, but slower"
    x, grad, bias = torch.randn(9, 16), torch.randn(9, 24), torch.randn(24)
    torch.testing.assert_close(packed.linear(x, bias), x @ weight.T + bias)
    torch.testing.assert_close(packed.input_gradient(grad), grad @ weight)
    before = x.clone()
    torch.testing.assert_close(packed.input_gradient(grad, x), x + grad @ weight)
    assert torch.equal(x, before)


def test_other_precisions_and_trainable_weights_are_not_packed() -> None:
    assert pack(torch.randn(4, 4, dtype=torch.float64)) is None
    assert pack(torch.randn(4, 4, requires_grad=True)) is None
