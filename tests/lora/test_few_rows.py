"""Products of few rows with a weight in blocks are the plain ones."""

import copy

import pytest
import torch

from lorafleet.lora.few_rows import FewRows
from lorafleet.lora.grouped_gemm import has_grouped_gemm
from lorafleet.lora.packed import PackedWeight, pack

X = torch.randn(17, 12)
pytestmark = pytest.mark.skipif(not has_grouped_gemm(X), reason="this PyTorch carries no grouped products for CPUs")


@pytest.mark.parametrize(("out", "width"), [(32, 16), (35, 16), (5, 16), (48, 48)])
def test_products(out: int, width: int) -> None:
    weight, bias = torch.randn(out, 12), torch.randn(out)
    few = FewRows.of(weight, width)
    for rows in (1, 8, 40, 3, 1):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(few.linear(x, None), x @ weight.T)
        torch.testing.assert_close(few.linear(x, bias), x @ weight.T + bias)
    columns = torch.randn(3, 24)[:, ::2]  # not side by side in memory
    torch.testing.assert_close(few.linear(columns, None), columns @ weight.T)


def test_a_weight_that_is_stored_transposed() -> None:
    weight = torch.randn(12, 20).T
    torch.testing.assert_close(FewRows.of(weight, 16).linear(X[:4], None), X[:4] @ weight.T)


def test_a_copy_lies_in_places_of_its_own() -> None:
    weight = torch.randn(20, 12)
    few = FewRows.of(weight, 16)
    twin = copy.deepcopy(few)
    few._blocks.zero_()
    torch.testing.assert_close(twin.linear(X[:4], None), X[:4] @ weight.T)


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("bias", [None, torch.randn(200)])
def test_a_row_gets_the_same_bits_among_any_number(bias: torch.Tensor | None) -> None:
    few, x = FewRows.of(torch.randn(200, 320), 16), torch.randn(40, 320)
    wanted = few.linear(x, bias)
    for rows in range(1, 40):
        for part in (slice(0, rows), slice(40 - rows, 40)):
            assert torch.equal(few.linear(x[part], bias), wanted[part])


def test_single_rows_take_the_blocks_however_many_and_others_do_not() -> None:
    weight = torch.randn(20, 12)
    packed = PackedWeight(weight, training=False, width=16)
    assert packed._few is not None
    packed._few._blocks.zero_()
    for rows in (1, 17):
        assert not packed.linear(X[:rows], None, single=True).any()
        torch.testing.assert_close(packed.linear(X[:rows], None), X[:rows] @ weight.T)
    assert packed.linear(X[:0], None, single=True).shape == (0, 20)
    few = packed._few
    others = X[:2].double(), X[:2].bfloat16(), X[:2, :5], X[:2].to("meta")
    assert few.takes(X[:2]) and not any(map(few.takes, others))
    trained = pack(weight)
    assert trained is None or trained._few is None  # in training a pass has many rows
