"""DoRA: the norms without the sum, a fresh adapter, merging, and what is computed anew when."""

import pytest
import torch

from lorafleet.config.lora import LoraConfig
from lorafleet.lora import LoraBank, Routing, inject_lora
from lorafleet.lora.dora import row_norms
from tests.tiny import ARCHITECTURES, tiny_model

IDS = torch.tensor([[5, 9, 200, 33, 71, 400, 3, 18]])


def logits(bank: LoraBank, slot: int = 0) -> torch.Tensor:
    with torch.no_grad(), bank.route(Routing((slot,), (IDS.numel(),))):
        return bank.model(IDS).logits


def changed(bank: LoraBank, seed: int = 1) -> LoraBank:
    generator = torch.Generator().manual_seed(seed)
    for one in bank.slot_parameters(0).values():
        one.value.add_(0.2 * torch.randn(one.value.shape, generator=generator, dtype=one.value.dtype))
    return bank


def test_norms_equal_those_of_the_sum() -> None:
    weight, low_A, low_B = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (3, 5), (3, 7)))
    found = row_norms(weight.square().sum(1), lambda x: x @ weight.T, low_A, low_B, 0.7)
    torch.testing.assert_close(found, (weight + 0.7 * low_B.T @ low_A).norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_fresh_adapter_leaves_the_output_bitwise(arch: str) -> None:
    bank = inject_lora(tiny_model(arch), LoraConfig(r=4, use_dora=True))
    assert torch.equal(logits(bank), tiny_model(arch)(IDS).logits)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_equals_unmerged(arch: str, bias: str) -> None:
    bank = changed(inject_lora(tiny_model(arch), LoraConfig(r=4, use_dora=True, bias=bias)))
    before = logits(bank)
    bank.merge(0)
    assert (logits(bank) - before).abs().max() <= 1e-5 * before.abs().max()
    bank.unmerge()
    assert torch.equal(logits(bank), before)


def test_norms_follow_every_change_of_a_slot() -> None:
    bank = changed(inject_lora(tiny_model("llama"), LoraConfig(r=4, use_dora=True)))
    first, tensors = logits(bank), bank.state_dict(0)
    changed(bank, seed=2)
    assert not torch.equal(logits(bank), first)
    bank.load_state_dict(0, tensors)
    assert torch.equal(logits(bank), first)
    bank.add(LoraConfig(r=9, use_dora=True))  # grows every layer
    assert torch.equal(logits(bank), first)
    bank.remove(0)
    bank.add(LoraConfig(r=4, use_dora=True), slot=0)
    assert torch.equal(logits(bank), tiny_model("llama")(IDS).logits)


def test_norms_follow_a_fused_optimizer() -> None:
    """Its steps do not count as a change of version."""
    bank = inject_lora(tiny_model("llama"), LoraConfig(r=4, use_dora=True))
    logits(bank)
    optimizer = torch.optim.AdamW((p for p in bank.model.parameters() if p.requires_grad), lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        with bank.route(Routing((0,), (IDS.numel(),))):
            bank.model(IDS).logits.square().mean().backward()
        optimizer.step()
    again = inject_lora(tiny_model("llama"), LoraConfig(r=4, use_dora=True))
    again.load_state_dict(0, bank.state_dict(0))
    assert torch.equal(logits(bank), logits(again))
