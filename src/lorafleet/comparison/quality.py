"""Quality with its uncertainty: bootstrap intervals over test rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sacrebleu.significance import PairedTest
from scipy.stats import bootstrap

from lorafleet.evaluation.metrics import label_scores
from lorafleet.evaluation.text_metrics import corpus_metrics, reference_streams, rouge_l

logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it tells each step

RESAMPLES = 2000
CHANCE = 0.05
"""A difference that chance makes more often than so is within noise."""

Interval = tuple[float, float]


def interval(statistic: Callable[..., float], *columns: Sequence[float], chance: float = CHANCE) -> Interval | None:
    """Percentile interval of a statistic of rows by resampling rows (Efron 1979).

    Args:
        statistic: Takes the columns, each ``(rows,)``.
        columns: One number for each row.
        chance: The share of resamples that may lie outside, half of it on each side.

    Returns:
        Lower and upper end; none for fewer than two rows.
    """
    if len(columns[0]) < 2:
        return None
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    found = bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=1 - chance,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio_of_sums(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> float:
    """Mean loss per token from each row's sum and count."""
    return float(numerators.sum() / denominators.sum())


def quality_intervals(rows: Mapping[str, Sequence[Any]]) -> dict[str, Interval | None]:
    """Intervals of the metrics that each row has a share in; of BLEU and chrF see :func:`text_tests`.

    Args:
        rows: ``loss_sum`` and ``loss_tokens`` of each row; where there are any, ``label_right``, the labels that are
            ``wanted`` and ``predicted``, ``text_right``, ``texts`` and ``references``.
    """
    found = {"loss": interval(ratio_of_sums, rows["loss_sum"], rows["loss_tokens"])}
    for key, name in (("label_right", "accuracy"), ("text_right", "exact_match")):
        if rows.get(key):
            found[name] = interval(np.mean, rows[key])
    if rows.get("texts"):
        found["rouge_l"] = interval(np.mean, rouge_l(rows["texts"], rows["references"]))
    if rows.get("wanted"):
        numbers = {label: number for number, label in enumerate(sorted({*rows["wanted"], *rows["predicted"]}))}
        columns = [[numbers[label] for label in rows[name]] for name in ("wanted", "predicted")]
        found["macro_f1"] = interval(lambda *both: label_scores(*both)["macro_f1"], *columns)
    return found


def difference(
    one: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]], metric: str, chance: float = CHANCE
) -> Interval | None:
    """Interval of ``one - other`` on the same rows; one that holds 0 is within noise."""
    if metric == "loss":
        columns = [one["loss_sum"], other["loss_sum"], one["loss_tokens"]]
        return interval(lambda a, b, n: float((a.sum() - b.sum()) / n.sum()), *columns, chance=chance)
    key = {"accuracy": "label_right", "exact_match": "text_right"}[metric]
    return interval(lambda a, b: float(np.mean(a) - np.mean(b)), one[key], other[key], chance=chance)


def within_noise(one: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]], metric: str) -> bool:
    """Whether chance alone makes two methods differ by so much on the same rows."""
    if metric == "chrf":
        # Texts of both are there where references are.
        tests = text_tests({"one": one["texts"], "other": other["texts"]}, other["references"], "other")
        return tests["one"].p_values[metric] >= CHANCE
    gap = difference(one, other, metric)
    return gap is None or gap[0] <= 0 <= gap[1]


class TextTest(NamedTuple):
    """BLEU and chrF of one method's texts.

    Args:
        intervals: Of each metric.
        p_values: How likely it is by chance that a metric differs so much from the baseline's; none of the baseline.
    """

    intervals: dict[str, Interval]
    p_values: dict[str, float]


def text_tests(
    texts: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]], baseline: str
) -> dict[str, TextTest]:
    """Resample rows for metrics of a whole corpus: sacrebleu's paired bootstrap (Koehn 2004).

    Args:
        texts: By method, one text for each row.
        references: What each row's text may be.
        baseline: The method that the others are held against.
    """
    names = [baseline, *(name for name in texts if name != baseline)]
    metrics = corpus_metrics(references)
    systems = [(name, list(texts[name])) for name in names]
    test = PairedTest(systems, metrics, reference_streams(references), test_type="bs", n_samples=RESAMPLES)
    columns = [results for title, results in test()[1].items() if title != "System"]
    found = {name: TextTest({}, {}) for name in names}
    for metric, results in zip(metrics, columns, strict=True):
        for name, one in zip(names, results, strict=True):
            found[name].intervals[metric] = (float(one.mean - one.ci), float(one.mean + one.ci))
            if one.p_value is not None:
                # Of equal scores sacrebleu would say that they differ.
                found[name].p_values[metric] = float(one.p_value) if one.score != results[0].score else 1.0
    return found
