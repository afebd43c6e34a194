"""Scores of predictions: accuracy, macro-F1, exact match, and whether a difference is more than chance."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

ANSWERS = ("exact_match", "bleu", "chrf", "rouge_l")
"""The measures that need generated answers."""

_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?\d+(?:,\d{3})*(?:\.\d+)?")
_FINAL = "####"


def label_scores(references: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the labels that occur in references or predictions, each counting the same."""
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
    }


def in_figures(metric: str, value: float) -> str:
    """A measurement as people write it: a loss with four digits, a share as percent, a latency as a multiple."""
    if metric in ("accuracy", "macro_f1", "exact_match"):
        return f"{value:.1%}"
    if metric == "latency":
        return f"{value:.2f} ×"
    if metric == "parameters":
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if "loss" in metric else f"{value:,.2f}"


def in_words(metric: str) -> str:
    """A measurement's name as people write it."""
    names = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L", "macro_f1": "macro F1"}
    return names.get(metric, metric.replace("_", " "))


def majority(references: Sequence[str]) -> tuple[str, float]:
    """The most frequent label (the first in the alphabet among equals) and the accuracy of always answering it."""
    counts = Counter(references)
    label = min(counts, key=lambda name: (-counts[name], name))
    return label, counts[label] / len(references)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """McNemar's exact test: the p-value of two models being right equally often on the same rows.

    Only rows that one model has right and the other wrong count; under the null they fall to either side like a coin
    (McNemar 1947, two-sided binomial form).
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def is_right(text: str, references: Sequence[str]) -> bool:
    """Whether a generated text agrees with one of the references.

    A reference that is a number, or that ends in ``#### number`` as in GSM8K, is compared with the last number of the
    text (the one behind its own ``####``, if it has one). Any other reference is compared whole; case, white space,
    width of characters, and punctuation and symbols at both ends do not count.
    """
    return any(_agrees(text, reference) for reference in references)


def _agrees(text: str, reference: str) -> bool:
    wanted = number_of(reference)
    if wanted is not None:
        return final_number(text) == wanted
    return normalised(text) == normalised(reference)


def number_of(reference: str) -> Decimal | None:
    """The number that a reference stands for: all of it, or what follows its last ``####``."""
    text = unicodedata.normalize("NFKC", reference).rpartition(_FINAL)[2].strip().strip("$€£¥%.")
    return _decimal(text) if _NUMBER.fullmatch(text) else None


def final_number(text: str) -> Decimal | None:
    """The last number of a text, or the first behind its last ``####``; none when there is none."""
    _, mark, tail = unicodedata.normalize("NFKC", text).rpartition(_FINAL)
    numbers = _NUMBER.findall(tail)
    return _decimal(numbers[0 if mark else -1]) if numbers else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def normalised(text: str) -> str:
    """A text without the differences that exact match overlooks."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(words)
    while start < end and _is_trim(words[start]):
        start += 1
    while end > start and _is_trim(words[end - 1]):
        end -= 1
    # A text of signs alone is compared as it is.
    return words[start:end] or words


def _is_trim(character: str) -> bool:
    return unicodedata.category(character)[0] in "PSZ"
