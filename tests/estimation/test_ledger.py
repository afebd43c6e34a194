"""The books of a pass: memory that comes and goes, operations, bytes moved."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lorafleet.estimation.ledger import Ledger, NoValues, Product

FLOAT = 4


def meta(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


def test_memory_comes_and_goes() -> None:
    x = meta(10, 20)
    with Ledger([x], vocabulary=99) as ledger:
        y = x * 2
        assert ledger.live == 200 * FLOAT
        view = y.T[:5]
        del y
        assert ledger.live == 200 * FLOAT  # a view holds its storage
        z = view + 1
        del view
        assert (ledger.live, ledger.peak) == (50 * FLOAT, 250 * FLOAT)
        del z
        assert ledger.live == 0
    assert ledger.peak == 250 * FLOAT


def test_what_was_there_before_is_not_counted() -> None:
    weight = meta(8, 8)
    with Ledger([weight], vocabulary=99) as ledger:
        views = weight.T, weight.detach()[:2]
    assert (ledger.live, ledger.calls, ledger.traffic, len(views)) == (0, 0, 0, 2)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_operations_of_products(device: str) -> None:
    x, weight = (torch.zeros(shape, device=device, requires_grad=True) for shape in ((6, 4), (4, 5)))
    out = torch.zeros(6, 5, device=device)
    with Ledger([x, weight, out], vocabulary=99) as ledger:
        (x @ weight).sum().backward()
        assert ledger.flops == 3 * 2 * 6 * 4 * 5  # the product, and both gradients
        with torch.no_grad():
            out.addmm_(x, weight)  # in place
            torch.mm(x, weight, out=out)
    assert ledger.flops == 5 * 2 * 6 * 4 * 5


def test_products_are_counted_by_shape_and_by_how_their_weight_lies() -> None:
    x, weight, bias, entries = meta(6, 4, grad=True), meta(5, 4), meta(5), meta(3, 6, 4)
    with Ledger([x, weight, bias, entries], vocabulary=99, laid_out=[weight]) as ledger:
        torch.addmm(bias, x, weight.T).sum().backward()
        torch.bmm(entries, entries.mT)
        entries.clone().baddbmm_(meta(3, 6, 2), meta(3, 2, 4))
    assert ledger.products == {
        Product(1, 6, 4, 5, laid_out=True): 2 * 6 * 4 * 5,
        Product(1, 6, 5, 4, laid_out=True): 2 * 6 * 4 * 5,
        Product(3, 6, 4, 6, laid_out=False): 2 * 3 * 6 * 4 * 6,
        Product(3, 6, 2, 4, laid_out=False): 2 * 3 * 6 * 2 * 4,
    }
    assert ledger.flops == sum(ledger.products.values())


def test_a_pass_costs_the_same_with_values_and_without() -> None:
    found = []
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(device)
        x = torch.zeros(3, 16, device=device)
        with Ledger([*model.parameters(), x], vocabulary=64) as ledger:
            model(x).square().mean().backward()
        found.append((ledger.peak, ledger.live, ledger.logits_at_peak, ledger.flops, ledger.traffic, ledger.calls))
    assert found[0] == found[1]
    assert found[0][1] >= sum(p.numel() for p in model.parameters()) * FLOAT  # the gradients stay


def test_logits_are_told_apart() -> None:
    with Ledger([], vocabulary=50) as ledger:
        wide = torch.empty(4, 50, device="meta")
        narrow = torch.empty(100, device="meta")
    assert (ledger.peak, ledger.logits_at_peak) == (wide.nbytes + narrow.nbytes, wide.nbytes)


def test_attention_holds_no_scores_and_masks_are_built() -> None:
    query, key = meta(1, 4, 300, 8, grad=True), meta(1, 2, 300, 8)
    with NoValues(), Ledger([query, key], vocabulary=99) as ledger:
        out = scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        assert out.shape == query.shape
        assert ledger.peak < 4 * 300 * 300 * FLOAT  # less than the scores alone
        assert ledger.flops == 2 * 2 * 4 * 300 * 300 * 8
        out.sum().backward()
        assert not (meta(3) == 1).all()
    assert query.grad is not None and ledger.flops > 3 * 2 * 2 * 4 * 300 * 300 * 8
