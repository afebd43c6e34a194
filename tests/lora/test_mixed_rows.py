"""Products of few rows and many slots, prepared once, equal the definition."""

import pytest
import torch

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
            wanted = torch.zeros_like(y, dtype=torch.float64)
            for s in layer.segments:
                rows = slice(s.start, s.stop)
                low_A, low_B = layer.lora_A[s.slot].double(), layer.lora_B[s.slot].double()
                wanted[rows] = s.scaling * x[rows].double() @ low_A.T @ low_B
            assert torch.allclose(y.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.usefixtures("one_order")
def test_a_row_gets_the_same_bits_whatever_the_others_are() -> None:
    random = torch.Generator().manual_seed(2)
    ranks, outs, slots = (16, 5), [576, 192, 192], torch.randint(0, 2, (32,), generator=random).sort().values.tolist()
    low_A = [torch.randn((2, 16, 576), generator=random) for _ in outs]
    low_B = [torch.randn((2, 16, out), generator=random) for out in outs]
    for low in (*low_A, *low_B):
        low[1, ranks[1] :] = 0
    x, y = torch.randn((32, 576), generator=random), torch.randn((32, sum(outs)), generator=random)

    def answered(rows: list[int]) -> torch.Tensor:
        own = [LoraSegment(slots[row], i, i + 1, ranks[slots[row]], 0.7) for i, row in enumerate(rows)]
        tensors = [LinearTensors(x, None, A, B, None, own) for A, B in zip(low_A, low_B, strict=True)]
        found = y[rows]
        MixedRows(tensors, [sum(outs)] * 3).add(x[rows], found.split(outs, dim=1))
        return found

    alone = torch.cat([answered([row]) for row in range(32)])
    for count in range(2, 33):
        rows = torch.randperm(32, generator=random)[:count].sort().values.tolist()
        assert torch.equal(answered(rows), alone[rows])
