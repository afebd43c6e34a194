"""What a search can improve, in which direction, and what of it the data can give."""

from collections.abc import Mapping, Sequence
from typing import Literal

from lorafleet.data.load import Data
from lorafleet.errors import did_you_mean

DIRECTIONS: Mapping[str, Literal["minimize", "maximize"]] = {
    "loss": "minimize",
    "perplexity": "minimize",
    "accuracy": "maximize",
    "macro_f1": "maximize",
    "exact_match": "maximize",
    "parameters": "minimize",
    "latency": "minimize",
}
"""Every objective and its direction, which its name decides: a loss is never maximised."""

LABELS = ("accuracy", "macro_f1")
COSTS = ("parameters", "latency")


def objective_faults(objectives: Sequence[str], data: Data) -> list[str]:
    """Which objectives are unknown, or cannot be measured on these rows."""
    faults = []
    for name in objectives:
        if name not in DIRECTIONS:
            near = did_you_mean(name, DIRECTIONS)
            faults.append(f"objective = {name!r} is unknown{near}; there are {', '.join(DIRECTIONS)}")
        elif name in LABELS and data.task != "label":
            faults.append(f"objective = {name} needs text/label rows; these are {data.task} rows")
        elif name == "exact_match" and data.task == "text":
            faults.append("objective = exact_match needs rows with a prompt; these are plain text")
    if set(objectives) <= set(COSTS):
        faults.append(f"objective = {', '.join(objectives)} needs no training; name a measure of quality beside it")
    return faults
