"""The knobs of combining adapters."""

from typing import Literal

from lorafleet.config.knob import Section, knob

Combination = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


class CombineConfig(Section):
    """How adapters become one."""

    output_dir: str = knob(..., "Folder for the combined adapter.", names=("output",))
    combination: Combination = knob(
        "cat",
        "cat is exact and adds the ranks up; svd is the best one of a smaller rank; linear, ties and dare_* need equal "
        "ranks.",
        names=("combination_type",),
    )
    weights: list[float] = knob([], "Of each adapter; equal shares that add up to 1 when not given.")
    density: float = knob(0.5, "Share of the numbers that ties, dare_* and magnitude_prune keep.", gt=0, le=1)
    rank: int | None = knob(None, "Rank of a combination by SVD; the largest of the adapters' when not given.", ge=1)
    majority_sign_method: Literal["total", "frequency"] = knob(
        "total", "Which sign wins in ties: of the larger sum, or of the more adapters."
    )
    seed: int = knob(42, "Seed of dare_*, which drops numbers at random.", ge=0)
