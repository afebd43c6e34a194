"""The hand-written product against plain autograd."""

import pytest
import torch
from torch import Tensor

from lorafleet.lora import LinearTensors, LoraSegment, lora_linear_reference, lora_linears
from lorafleet.lora.segments import dropout_mask

IN, OUT, R = 5, 7, 3

LAYOUTS = {
    "one segment": [LoraSegment(0, 0, 12, 3, 2.0)],
    "one segment with a bias": [LoraSegment(1, 0, 12, 2, 1.5, trains_bias=True)],
    "a bias alone": [LoraSegment(2, 0, 12, 0, 0.0, trains_bias=True)],
    "distinct, equal lengths": [LoraSegment(k, 4 * k, 4 * k + 4, 3, 0.5 + k) for k in range(3)],
    "mixed ranks, equal lengths": [LoraSegment(k, 4 * k, 4 * k + 4, k + 1, 0.5 + k) for k in range(3)],
    "ragged": [LoraSegment(2, 0, 1, 2, 1.0), LoraSegment(0, 1, 9, 3, 0.25), LoraSegment(1, 9, 12, 1, 4.0)],
    "a slot twice": [LoraSegment(1, 0, 4, 3, 1.5), LoraSegment(0, 4, 8, 3, 1.0), LoraSegment(1, 8, 12, 3, 1.5)],
    "ragged, rank 1": [LoraSegment(2, 0, 1, 1, 1.0), LoraSegment(0, 1, 9, 1, 0.25), LoraSegment(1, 9, 12, 1, 4.0)],
    "base rows between": [LoraSegment(0, 2, 5, 3, 1.0), LoraSegment(2, 8, 11, 2, 1.0)],
    "frozen rows": [LoraSegment(0, 0, 5, 3, 1.0, frozen=2), LoraSegment(2, 5, 12, 2, 2.0)],
    "rank 0": [LoraSegment(0, 0, 6, 0, 0.0, trains_bias=True), LoraSegment(1, 6, 12, 3, 1.0)],
    "dropout": [LoraSegment(0, 0, 5, 3, 1.0, 0.5, 11), LoraSegment(1, 5, 12, 2, 1.0, 0.3, 12)],
    "biases": [LoraSegment(k, 4 * k, 4 * k + 4, 3, 1.0, trains_bias=k != 1) for k in range(3)],
}


def tensors(dtype: torch.dtype, segments: list[LoraSegment]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "x": (12, IN),
        "weight": (OUT, IN),
        "bias": (OUT,),
        "lora_A": (3, R, IN),
        "lora_B": (3, R, OUT),
        "lora_bias": (3, OUT),
    }
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    ranks = {s.slot: s.rank for s in segments}
    for slot in range(3):
        made["lora_A"][slot, ranks.get(slot, 0) :] = 0
        made["lora_B"][slot, ranks.get(slot, 0) :] = 0
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def layer(made: dict[str, Tensor], segments: list[LoraSegment]) -> LinearTensors:
    return LinearTensors(*(made[name] for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias")), segments)


def lora_linear(made: dict[str, Tensor], segments: list[LoraSegment]) -> Tensor:
    return lora_linears(made["x"], [layer(made, segments)])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "one by one"])
def test_equals_the_reference_forward_and_backward(
    layout: str, dtype: torch.dtype, tolerance: float, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not grouped:
        monkeypatch.setattr("lorafleet.lora.segments.has_grouped_gemm", lambda like: False)
    segments = LAYOUTS[layout]
    fast, slow = tensors(dtype, segments), tensors(dtype, segments)
    y, expected = lora_linear(fast, segments), lora_linear_reference(slow["x"], layer(slow, segments))
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(lora_linear(fast, segments), expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, tensor in fast.items():
        wanted = slow[name].grad if slow[name].grad is not None else torch.zeros_like(slow[name])
        torch.testing.assert_close(tensor.grad, wanted, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "frozen rows"])
def test_gradcheck(layout: str) -> None:
    segments = LAYOUTS[layout]
    made = tensors(torch.float64, segments)
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(dict(zip(made, t, strict=True)), segments), tuple(made.values())
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dropout"])
def test_layers_that_share_their_input_equal_the_reference(layout: str) -> None:
    # The second layer is wider, has other scales, and adapts nothing in slot 0.
    def second(s: LoraSegment) -> LoraSegment:
        return s._replace(rank=s.rank if s.slot else 0, scaling=3 * s.scaling)

    layouts = [LAYOUTS[layout], [second(s) for s in LAYOUTS[layout]]]
    results = []
    for joint in (True, False):
        made = [tensors(torch.float64, segments) for segments in layouts]
        made[1]["weight"], made[1]["x"] = made[1]["weight"].detach().mul(2).requires_grad_(), made[0]["x"]
        layers = [layer(one, segments) for one, segments in zip(made, layouts, strict=True)]
        x = made[0]["x"]
        ys = lora_linears(x, layers) if joint else [lora_linear_reference(x, one) for one in layers]
        sum(y.sin().sum() * (i + 1) for i, y in enumerate(ys)).backward()  # type: ignore[union-attr]
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for one in made for t in one.values()]
        results.append([*ys, *grads])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_input_may_lie_in_memory_as_it_likes() -> None:
    segments = LAYOUTS["dropout"]
    results = []
    row = tensors(torch.float64, segments)["x"].detach()[:1]
    rows = row.repeat(12, 1)
    for x in (rows.T.contiguous().T, rows.repeat_interleave(2, 1)[:, ::2], row.expand(12, IN), rows):
        made = tensors(torch.float64, segments)
        made["x"] = x.requires_grad_()
        y = lora_linear(made, segments)
        y.sin().sum().backward()
        results.append([y, *(tensor.grad for tensor in (x, made["lora_A"], made["lora_B"]))])
    wanted = results.pop()
    for got in results:
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rank_padding_gets_no_gradient() -> None:
    segments = LAYOUTS["mixed ranks, equal lengths"]
    made = tensors(torch.float32, segments)
    lora_linear(made, segments).square().sum().backward()
    for slot, rank in ((0, 1), (1, 2)):
        assert made["lora_A"].grad is not None and made["lora_B"].grad is not None
        assert not made["lora_A"].grad[slot, rank:].any()
        assert not made["lora_B"].grad[slot, rank:].any()


def test_dropout_mask_follows_its_seed_and_keeps_the_mean() -> None:
    like = torch.zeros(1)
    mask = dropout_mask(3, (200, 50), 0.25, like)
    assert torch.equal(mask, dropout_mask(3, (200, 50), 0.25, like))
    assert not torch.equal(mask, dropout_mask(4, (200, 50), 0.25, like))
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert mask.mean().item() == pytest.approx(1.0, abs=0.02)


def test_only_the_input_and_rank_wide_tensors_are_kept_for_backward() -> None:
    segments = LAYOUTS["one segment"]
    made = tensors(torch.float32, segments)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(made, segments)
    known = {tensor.data_ptr() for tensor in made.values()}
    others = [tuple(t.shape) for t in kept if t.data_ptr() not in known]
    assert others == [(12, R)]
