"""What a search can improve, in which direction, and what of it the data can give."""

from collections.abc import Mapping, Sequence
from typing import Literal

from lorafleet.data.load import Data
from lorafleet.errors import did_you_mean
from lorafleet.evaluation.measure import short_answer
from lorafleet.evaluation.metrics import ANSWERS

DIRECTIONS: Mapping[str, Literal["minimize", "maximize"]] = {
    "loss": "minimize",
    "perplexity": "minimize",
    "accuracy": "maximize",
    "macro_f1": "maximize",
    "exact_match": "maximize",
    "bleu": "maximize",
    "chrf": "maximize",
    "rouge_l": "maximize",
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
        elif name in ANSWERS and data.task == "text":
            faults.append(f"objective = {name} needs rows with a prompt; these are plain text")
        elif name in ANSWERS and name != "exact_match" and _has_no_texts(data):
            faults.append(f"objective = {name} needs answers that are texts; these are labels or short answers")
    if set(objectives) <= set(COSTS):
        faults.append(f"objective = {', '.join(objectives)} needs no training; name a measure of quality beside it")
    return faults


def _has_no_texts(data: Data) -> bool:
    """Whether all held-out answers are labels, or short ones such as a number."""
    rows = data.splits.get("valid")
    return data.task == "label" or (rows is not None and all(short_answer(row) is not None for row in rows))
