"""Products of all slots at once, made for a GPU, equal the definition; here on any device."""

import pytest
import torch

from lorafleet.lora.dense_rows import DenseRows, takes_dense_rows
from tests.lora.test_mixed_rows import X, layers
from tests.test_devices import DEVICES


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_each_segment_gets_its_slots_product(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    both = [
        layer._replace(lora_A=layer.lora_A.to(device), lora_B=layer.lora_B.to(device))
        for layer in layers(torch.float64)
    ]
    joint = torch.zeros(9, 12, dtype=dtype, device=device)
    outputs = joint.split([5, 7], dim=1)  # columns of one tensor
    prepared = DenseRows(both, X.to(device, dtype))
    for x in (X.to(device, dtype), -2 * X.to(device, dtype)):
        joint.zero_()
        prepared.add(x, outputs)
        for layer, y in zip(both, outputs, strict=True):
            wanted = torch.zeros_like(y, dtype=torch.float64)
            for s in layer.segments:
                rows = slice(s.start, s.stop)
                wanted[rows] = s.scaling * x[rows].double() @ layer.lora_A[s.slot].T @ layer.lora_B[s.slot]
            assert (y - wanted).norm() <= tolerance * wanted.norm()
            assert not y[4].any() and not y[7:].any()  # rows of no segment


def test_copies_are_known_to_be_old() -> None:
    both = layers(torch.float64)
    prepared = DenseRows(both, X)
    assert prepared.fits(both) and not prepared.fits(list(both))
    both[1].lora_B[0].neg_()
    assert not prepared.fits(both)


def test_it_is_for_few_rows_and_ranks() -> None:
    both = layers(torch.float64)
    assert takes_dense_rows(X, both)
    assert not takes_dense_rows(X.repeat(20, 1), both)
    assert not takes_dense_rows(X.to("meta"), both)
    wide = [both[0]._replace(segments=[s._replace(rank=2000) for s in both[0].segments])]
    assert not takes_dense_rows(X, wide)
