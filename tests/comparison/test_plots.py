"""Axes that can be read, whatever stands at them."""

from collections.abc import Sequence

import pytest

from lorafleet.comparison.plots import in_short, spread
from lorafleet.training.plot import new_figure


@pytest.mark.parametrize(
    ("value", "text"), [(0.3, "0.3"), (50, "50"), (1500, "1.5k"), (2e6, "2M"), (-3e9, "-3G"), (0, "0")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert in_short(value) == text


@pytest.mark.parametrize(
    ("values", "scale", "shown"),
    [
        ([42.0, 93.0], "linear", "50"),
        ([0.3, 16.0], "log", "5"),
        ([2e5, 1.4e8], "log", "50M"),
        ([1.0, 1e9], "log", "10k"),
        ([-0.3, 16.0], "linear", "4"),
    ],
)
def test_an_axis_is_logarithmic_where_values_are_far_apart(values: Sequence[float], scale: str, shown: str) -> None:
    figure, axes = new_figure(3.0)
    axes.plot(values, [1.0] * len(values))
    spread(axes, "x")
    assert axes.get_xscale() == scale
    figure.canvas.draw()
    assert shown in [label.get_text() for label in axes.get_xticklabels()]
