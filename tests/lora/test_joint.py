"""What layers that read the same input prepare for a routing is right whatever happens to their slots."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorafleet.config import LoraConfig
from lorafleet.lora import LoraBank, Routing, inject_lora
from lorafleet.lora.dense_rows import _MOST_ROWS
from lorafleet.lora.functional import lora_linear_reference
from lorafleet.lora.grouped_gemm import has_grouped_gemm
from lorafleet.lora.layer import LoraLinear

ROUTING = Routing((0, 1, -1), (4, 3, 2), unit="rows")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}
X = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two layers that read the same input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(12, 5, bias=bias), nn.Linear(12, 7, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.up(x), self.gate(x)], dim=-1)


def prepared(dtype: torch.dtype, *, bias: bool = True) -> tuple[Pair, LoraBank, Callable[[], None]]:
    """A pair with two adapters, and a check that a mixed batch gives what the definition does."""
    model = Pair(bias).to(dtype)
    bank = inject_lora(model, [LoraConfig(r=r, target_modules=["up", "gate"]) for r in (2, 3)], num_slots=3)
    randomize(bank, 0, 1)
    x = X.to(dtype)
    bank.speed_up(lambda: model(x), training=False)

    def check() -> None:
        with torch.no_grad(), bank.route(ROUTING):
            mixed = model(x)
            segments = [s for s in model.up.router.segments(len(x)) if s.slot >= 0]
            parts = [one.tensors([one.segment(s) for s in segments], None) for one in (model.up, model.gate)]
            wanted = torch.cat([lora_linear_reference(x, part) for part in parts], dim=1)
        assert (mixed - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()

    return model, bank, check


def randomize(bank: LoraBank, *slots: int) -> None:
    for slot in slots:
        for parameter in bank.slot_parameters(slot).values():
            parameter.value.normal_()


# One is prepared for oneMKL where PyTorch carries it, another as on a GPU, the last with the base in the same call.
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float64, True), (torch.bfloat16, True), (torch.float32, False)])
def test_a_plan_is_made_anew_when_slots_change(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.lora.packed._fastest_width", lambda: 4)
    model, bank, check = prepared(dtype, bias=bias)
    check()
    bank.rescale(1, 3.0)
    check()
    bank.slot_parameters(0)["up.lora_A"].value.neg_()
    check()
    bank.remove(1)
    bank.add(LoraConfig(r=5, target_modules=["up"]), seed=3)
    randomize(bank, 1)
    check()
    model.float().to(dtype)
    check()
    if dtype == torch.float32:
        return  # what is in oneDNN's layout cannot be copied
    twin = copy.deepcopy(model)  # a copy lays out its own
    assert model.up.plans and all(plan is None for plan in twin.up.plans.values())
    assert twin.up.dense is None
    assert pickle.loads(pickle.dumps(next(iter(model.up.plans.values())))) is None


def test_what_a_fused_optimizer_changes_is_seen() -> None:
    model, bank, check = prepared(torch.bfloat16)
    check()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=10.0, fused=True)
    with bank.route(ROUTING):
        loss = model(X.bfloat16()).sum()
        check()  # before the backward pass, so that there are copies when the optimizer steps
        loss.backward()
    before = [parameter.detach().clone() for parameter in learned]
    optimizer.step()
    assert not all(map(torch.equal, before, learned))
    check()


def test_copies_of_slots_are_kept_while_a_routing_comes_again() -> None:
    model, bank, check = prepared(torch.bfloat16)
    check()
    dense = model.up.dense
    check()
    assert dense is not None and model.up.dense is dense
    with torch.no_grad(), bank.route(Routing((0, 1), (_MOST_ROWS, 1))):
        model(torch.zeros(_MOST_ROWS + 1, 12, dtype=torch.bfloat16))
    assert model.up.dense is dense  # many rows go without
    with torch.no_grad(), bank.route(Routing((1,), (9,))):
        model(X.bfloat16())
    assert model.up.dense is not dense


@pytest.mark.parametrize("name", ["up.lora_A", "up.lora_B"])
def test_numbers_that_are_none_stay_in_their_slot(name: str) -> None:
    model, bank, _ = prepared(torch.bfloat16)
    with torch.no_grad(), bank.route(ROUTING):
        right = model(X.bfloat16())
        bank.slot_parameters(0)[name].value.fill_(torch.nan)
        found = model(X.bfloat16())
    assert found[:4, :5].isnan().all() and not found[:, 5:].isnan().any()
    assert (found[4:] - right[4:]).norm() <= 0.02 * right.norm()


def test_blocks_of_few_rows_serve_layers_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.lora.packed._fastest_width", lambda: 4)
    model, _, check = prepared(torch.float32)
    joint = model.up.shared_input.joint
    assert joint is not None and joint.packed._few is not None
    check()
    joint.packed._few._blocks.zero_()
    with pytest.raises(AssertionError):
        check()


@pytest.fixture
def prepared_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows by blocks on any machine, and nothing but the prepared calls answers."""
    if not has_grouped_gemm(X.float()):
        pytest.skip("this PyTorch carries no grouped products for CPUs")
    monkeypatch.setattr("lorafleet.lora.packed._fastest_width", lambda: 4)
    for other in ("base_products", "lora_linears", "JointWeight.products"):
        monkeypatch.setattr(f"lorafleet.lora.joint.{other}", None)


def expected(layers: list[LoraLinear], x: torch.Tensor, slots: tuple[int, ...], rows: tuple[int, ...]) -> torch.Tensor:
    parts = x.split(list(rows))
    return torch.cat(
        [
            torch.cat(
                [
                    p @ (one.weight.detach() + (one.delta(slot) if slot >= 0 else 0)).T
                    for slot, p in zip(slots, parts, strict=True)
                ]
            )
            for one in layers
        ],
        dim=1,
    )


@pytest.mark.usefixtures("prepared_calls_only")
@pytest.mark.parametrize(("slots", "rows"), [((1,), (3,)), ((0, -1, 1), (2, 4, 1)), ((-1,), (5,)), ((0,), (16,))])
def test_few_rows_take_prepared_calls(slots: tuple[int, ...], rows: tuple[int, ...]) -> None:
    model, bank, _ = prepared(torch.float32, bias=False)
    x = torch.randn(sum(rows), 12)
    with torch.no_grad():
        for part in (x, -2 * x):
            with bank.route(Routing(slots, rows, unit="rows")):
                found = model(part), model.up(part)
            both, alone = expected([model.up, model.gate], part, slots, rows), expected([model.up], part, slots, rows)
            torch.testing.assert_close(found[0], both, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[1], alone, rtol=1e-5, atol=1e-5)
        for count in (5, 2):
            with bank.route(Routing((0,), (count,), unit="rows")), bank.disabled():
                torch.testing.assert_close(model.up(x[:1].repeat(count, 1))[-1], x[0] @ model.up.weight.T)


@pytest.mark.usefixtures("prepared_calls_only")
def test_a_prepared_call_refuses_an_input_of_another_width() -> None:
    model, bank, _ = prepared(torch.float32, bias=False)
    with torch.no_grad(), bank.route(Routing((0, 1), (4, 4), unit="rows")):
        model(torch.zeros(8, 12))
        with pytest.raises(RuntimeError):
            model(torch.zeros(8, 13))


def test_slots_that_change_a_bias_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.lora.joint.lora_linears", None)  # it would take other products than without them
    model = nn.Sequential(Pair(bias=True), nn.Linear(12, 4)).double()
    bank = inject_lora(
        model,
        [LoraConfig(r=2, target_modules=["up", "gate"]), LoraConfig(r=2, target_modules=["1"], bias="all")],
    )
    randomize(bank, 0, 1)
    bank.speed_up(lambda: model(X), training=False)
    with torch.no_grad(), bank.route(Routing((1, -1), (5, 4))):
        found = model[0](X)
    pair = model[0]
    biases = [torch.stack([one.bias + one.lora_bias[1]] * 5 + [one.bias] * 4) for one in (pair.up, pair.gate)]
    wanted = expected([pair.up, pair.gate], X, (-1,), (9,)) + torch.cat(biases, dim=1)
    torch.testing.assert_close(found, wanted)


def test_copies_of_slots_end_with_them() -> None:
    for end in (
        lambda model, bank: bank.remove(1),
        lambda model, bank: bank.add(LoraConfig(r=64, target_modules=["up"]), seed=0),
        lambda model, bank: model.float(),
    ):
        model, bank, check = prepared(torch.bfloat16)
        check()
        assert model.up.dense is not None
        end(model, bank)
        assert model.up.dense is None
