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
            wanted = torch.zeros_like(y)
            for s in layer.segments:
                rows = slice(s.start, s.stop)
                wanted[rows] = s.scaling * x[rows] @ layer.lora_A[s.slot].T @ layer.lora_B[s.slot]
            assert torch.allclose(y, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12)
