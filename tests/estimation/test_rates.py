"""The time that rates give, and where they are measured."""

import pytest
import torch

from lorafleet.estimation.ledger import Product
from lorafleet.estimation.rates import CALLS, PRODUCTS, ProductRate, Rates, measure_rates
from lorafleet.estimation.step import StepCost

WIDE, THIN = Product(1, 64, 512, 512, laid_out=True), Product(1, 64, 512, 8, laid_out=False)


def cost(products: dict[Product, float], flops: float, traffic: float = 0, calls: int = 0) -> StepCost:
    return StepCost(64, 0, 0, 0, flops, products, traffic, calls)


def test_each_product_takes_the_time_of_its_own_shape() -> None:
    rates = Rates("cpu", (ProductRate(WIDE, 100), ProductRate(THIN, 10)), flops=50, traffic=1000, call=0.5)
    products = {WIDE: 1000.0, THIN: 100.0}
    assert rates.seconds(cost(products, 1100)) == pytest.approx((10 + 10) / PRODUCTS)
    assert rates.seconds(cost(products, 1200)) == pytest.approx(
        (10 + 10 + 2) / PRODUCTS
    )  # attention, at the rate of all together
    assert rates.seconds(cost(products, 1100).scaled(0.5)) == pytest.approx(10 / PRODUCTS)
    assert rates.seconds(cost({}, 0, traffic=3000, calls=2)) == pytest.approx(3 + CALLS)


def test_what_is_computed_most_is_measured() -> None:
    rare = Product(2, 3, 4, 5, laid_out=False)
    found = measure_rates(torch.device("cpu"), torch.float32, [cost({WIDE: 1e9, THIN: 1e8, rare: 1e3}, 2e9)], 1 << 20)
    assert [one.shape for one in found.products] == [WIDE, THIN]
    slow, fast = sorted(one.flops for one in found.products)
    assert 0 < slow <= found.flops <= fast and found.traffic > 0 and found.call > 0


def test_what_is_too_large_to_be_measured_is_measured_smaller() -> None:
    huge = Product(1, 1 << 20, 1 << 13, 1 << 17, laid_out=True)
    found = measure_rates(torch.device("cpu"), torch.float32, [cost({huge: 1e18}, 1e18)], 1 << 30)
    assert found.products[0].flops > 0
