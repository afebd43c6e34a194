"""Attention over short sequences of one flat row, against PyTorch's own for each sequence by itself."""

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import lorafleet.models.short_attention as module
from lorafleet.config.lora import LoraConfig
from lorafleet.data.batches import Part, collate
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import inject_lora
from lorafleet.models.attention import FlatLayout
from lorafleet.models.short_attention import short_attention
from tests.evaluation.test_token_loss import make_rows
from tests.tiny import tiny_model

LENGTHS = {
    "one": (9,),
    "equal": (7, 7, 7),
    "unequal": (3, 9, 1, 9),
    "runs of equal and unequal": (4, 4, 33, 2, 2, 2),
}


def tensors(lengths: tuple[int, ...], heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, sum(lengths), count, 8) for count in (heads, 2, 2)]
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def alone(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    split = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    return torch.cat(
        [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
            for q, k, v in zip(*split, strict=True)
        ],
        dim=2,
    )


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_each_sequence_by_itself(lengths: tuple[int, ...], heads: int) -> None:
    results = []
    for together in (True, False):
        made = tensors(lengths, heads)
        out = short_attention(*made, 0.3, FlatLayout(lengths).runs) if together else alone(*made, lengths)
        results.append([out, *torch.autograd.grad(out.sin().sum(), made)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_what_a_layout_holds_goes_with_it() -> None:
    """By reference counts: a mask in a cycle would stay, and a step needs one as large again."""
    lengths = (3, 9, 5)
    made, runs = tensors(lengths, 6), FlatLayout(lengths).runs
    gc.disable()
    try:
        short_attention(*made, 0.3, runs).sum().backward()
        mask = ref(module._stack(runs, 6, 2, torch.float64).mask)
        module._stack.cache_clear()
        assert mask() is None
    finally:
        gc.enable()


def test_a_sequence_that_is_not_finite_leaves_its_neighbours_alone() -> None:
    lengths = (3, 9, 5)
    made = tensors(lengths, 6)
    with torch.no_grad():
        made[0][:, :, :3] = torch.nan
    out = short_attention(*made, 0.3, FlatLayout(lengths).runs)
    for tensor in (out, *torch.autograd.grad(out.sum(), made)):
        assert tensor[:, :, 3:].isfinite().all() and not tensor[:, :, :3].isfinite().all()


def test_keys_of_another_precision_do_not_come_here() -> None:
    """Under autocast rotary positions leave q and k in float32, v is in bfloat16: widths that oneMKL would mistake."""
    model = tiny_model("llama", torch.float32)
    loss_model = LossModel(model, inject_lora(model, LoraConfig(r=2)), 0)
    batch = collate([Part(0, make_rows(0, (5, 9)))])
    wanted = loss_model(batch).total.item()
    with torch.autocast("cpu", torch.bfloat16):
        total = loss_model(batch).total
        total.backward()
    assert total.item() == pytest.approx(wanted, rel=0.02)
