"""Who goes on from a rung."""

import pytest

from lorafleet.search.halving import rung_shares, survives


def test_rungs_are_powers_of_the_reduction() -> None:
    assert rung_shares(3, 2, 0.0) == pytest.approx((1 / 9, 1 / 3))
    assert rung_shares(2, 3, 0.2) == pytest.approx((1 / 4, 1 / 2))


def test_one_in_eta_goes_on() -> None:
    losses = [float(n) for n in range(9)]
    assert [survives(x, losses, 3, larger_is_better=False) for x in losses] == [True] * 3 + [False] * 6
    assert [survives(x, losses, 3, larger_is_better=True) for x in losses] == [False] * 6 + [True] * 3


def test_the_best_always_goes_on() -> None:
    assert survives(2.0, [2.0], 3, larger_is_better=False)
    assert survives(1.0, [2.0, 1.0], 4, larger_is_better=False)
    assert not survives(2.0, [2.0, 1.0], 4, larger_is_better=False)


def test_equals_are_treated_alike() -> None:
    assert survives(1.0, [1.0, 1.0, 2.0], 3, larger_is_better=False)
