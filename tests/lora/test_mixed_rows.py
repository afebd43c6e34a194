"""Products of few rows and many slots, prepared once, equal the definition."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lorafleet.config import LoraConfig
from lorafleet.lora import Routing, inject_lora
from lorafleet.lora.grouped_gemm import has_grouped_gemm
from lorafleet.lora.mixed_rows import MixedRows
from lorafleet.lora.segments import LinearTensors, LoraSegment

X = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.skipif(not has_grouped_gemm(X), reason="this PyTorch carries no grouped products for CPUs")


def layers(dtype: torch.dtype) -> list[LinearTensors]:
    """Two layers that read the same input, with slots of several ranks, one of them in one layer only."""
    random = torch.Generator().manual_seed(1)
    found = []
    for out, ranks in ((5, (2, 4, 0)), (7, (2, 3, 4))):
        segments = [(2, 0, 1), (0, 1, 4), (1, 5, 6), (0, 6, 7)]
        own = [LoraSegment(slot, a, b, ranks[slot], 0.5 + slot) for slot, a, b in segments]
        weight, low_A, low_B = (
            torch.randn(shape, generator=random, dtype=dtype) for shape in ((out, 12), (3, 4, 12), (3, 4, out))
        )
        for slot, rank in enumerate(ranks):
            low_A[slot, rank:], low_B[slot, rank:] = 0, 0
        found.append(LinearTensors(weight, None, low_A, low_B, None, own))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_segment_gets_its_slots_product(dtype: torch.dtype) -> None:
    both = layers(dtype)
    joint = torch.zeros(9, 12, dtype=dtype)
    outputs = joint.split([5, 7], dim=1)  # columns of one tensor
    prepared = MixedRows(both, [y.stride(0) for y in outputs])
    for x in (X.to(dtype), -2 * X.to(dtype)):
        joint.zero_()
        prepared.add(x, outputs)
        for layer, y in zip(both, outputs, strict=True):
            wanted = torch.zeros_like(y)
            for s in layer.segments:
                rows = slice(s.start, s.stop)
                wanted[rows] = s.scaling * x[rows] @ layer.lora_A[s.slot].T @ layer.lora_B[s.slot]
            assert torch.allclose(y, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12)


class Pair(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(12, 5).double(), nn.Linear(12, 7).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.up(x), self.gate(x)], dim=-1)


def test_a_plan_is_made_anew_when_slots_change() -> None:
    model = Pair()
    configs = [LoraConfig(r=r, target_modules=["up", "gate"]) for r in (2, 3)]
    bank = inject_lora(model, configs, num_slots=3)
    for slot in range(2):
        for parameter in bank.slot_parameters(slot).values():
            parameter.value.normal_()
    bank.speed_up(lambda: model(X), training=False)
    routing = Routing((0, 1, -1), (4, 3, 2))

    def check() -> None:
        with torch.no_grad(), bank.route(routing):
            mixed = model(X)
        solo = []
        for slot, rows in ((0, slice(4)), (1, slice(4, 7)), (-1, slice(7, 9))):
            with torch.no_grad(), bank.route(Routing((slot,), (rows.stop - (rows.start or 0),))):
                solo.append(model(X[rows].clone()))
        assert torch.allclose(mixed, torch.cat(solo), rtol=1e-12)

    check()
    bank.rescale(1, 3.0)
    check()
    bank.slot_parameters(0)["up.lora_A"].value.neg_()
    check()
    bank.remove(1)
    bank.add(LoraConfig(r=5, target_modules=["up"]), seed=3)
    for parameter in bank.slot_parameters(1).values():
        parameter.value.normal_()
    check()
    model.float().double()
    check()
    twin = copy.deepcopy(model)  # a copy lays out its own
    assert model.up.plans and all(plan is None for plan in twin.up.plans.values())
    assert pickle.loads(pickle.dumps(next(iter(model.up.plans.values())))) is None
