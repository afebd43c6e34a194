"""The report says what the numbers say, and of chance only where rows tell of it."""

import pytest

from lorafleet.fleets.report import conclusion
from lorafleet.fleets.result import FleetResult


@pytest.mark.parametrize(
    ("gain", "interval", "told"),
    [
        (0.2, (0.1, 0.3), "better than the base: accuracy +20.0 points (+10.0 to +30.0)."),
        (-0.2, (-0.3, -0.1), "worse than the base: accuracy -20.0 points (-30.0 to -10.0)."),
        (0.2, (-0.1, 0.5), "within noise of the base: accuracy +20.0 points (-10.0 to +50.0)."),
        (-1.0, None, "within noise of the base: accuracy -100.0 points on a single row."),
    ],
)
def test_gains_over_all_rows(gain: float, interval: tuple[float, float] | None, told: str) -> None:
    result = FleetResult("out", "tiny", (), (), {"own": 0.5}, "accuracy", {"base": (gain, interval)}, 1, 0, 0.0, 0.0)
    assert conclusion(result)[1] == f"Over all users' held-out rows, own adapters are {told}"
