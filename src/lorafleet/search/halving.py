"""Successive halving, asynchronous (Li et al. 2020, arXiv 1810.05934, in the form that stops instead of promoting).

At a rung, a share of the full budget, a trial goes on if it is among the best 1/eta of all that have come there so
far. Nobody waits for others; the rungs count tokens, so an interrupted search decides the same when it is resumed.
"""

from collections.abc import Sequence


def rung_shares(reduction_factor: int, rungs: int, grace_period: float) -> tuple[float, ...]:
    """At which shares of the full budget trials are compared, in order: ``eta^-rungs, …, eta^-1``."""
    shares = (reduction_factor**-power for power in range(rungs, 0, -1))
    return tuple(share for share in shares if share >= grace_period)


def survives(value: float, arrived: Sequence[float], reduction_factor: int, *, larger_is_better: bool) -> bool:
    """Whether a trial goes on from a rung.

    Args:
        value: Its objective there; never NaN.
        arrived: The objectives of all trials that have come to this rung so far, its own among them.
        reduction_factor: One in this many goes on; the best always does.
        larger_is_better: Direction of the objective.
    """
    better = sum((other > value) if larger_is_better else (other < value) for other in arrived)
    return better < max(1, len(arrived) // reduction_factor)
