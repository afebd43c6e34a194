"""Intervals of quality, against what is known of them."""

import numpy as np
import pytest

from lorafleet.comparison.quality import difference, interval, quality_intervals


def test_an_interval_of_a_share_is_that_of_the_binomial() -> None:
    right = [1.0] * 120 + [0.0] * 80
    found = interval(np.mean, right)
    assert found is not None
    deviation = (0.6 * 0.4 / 200) ** 0.5
    assert found == pytest.approx((0.6 - 1.96 * deviation, 0.6 + 1.96 * deviation), abs=0.012)


def test_it_follows_from_the_rows_alone() -> None:
    values = list(np.random.default_rng(1).normal(size=50))
    assert interval(np.mean, values) == interval(np.mean, values)


def test_one_row_has_none() -> None:
    assert interval(np.mean, [1.0]) is None


def test_long_rows_count_for_more_in_a_loss_per_token() -> None:
    rows = {"loss_sums": [10.0, 300.0], "loss_counts": [10, 100], "label_right": [1.0, 0.0]}
    found = quality_intervals(rows)
    low, high = found["loss"] or (0, 0)
    assert (low, high) == (1.0, 3.0) and set(found) == {"loss", "accuracy"}


def test_a_difference_of_the_same_rows_is_paired() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(10, 5, size=100).clip(1)
    one = {"loss_sums": list(hard + 0.1), "loss_counts": [10] * 100}
    other = {"loss_sums": list(hard), "loss_counts": [10] * 100}
    low, high = difference(one, other, "loss") or (0, 0)
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    same = {"label_right": [1.0, 0.0] * 20}
    assert difference(same, same, "accuracy") == (0.0, 0.0)
