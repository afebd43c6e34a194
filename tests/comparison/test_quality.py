"""Intervals of quality, against what is known of them."""

import numpy as np
import pytest

from lorafleet.comparison.quality import difference, interval, quality_intervals, text_tests
from lorafleet.evaluation.metrics import label_scores
from lorafleet.evaluation.text_metrics import text_scores


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
    rows = {"loss_sum": [10.0, 300.0], "loss_tokens": [10, 100], "label_right": [1.0, 0.0]}
    found = quality_intervals(rows)
    low, high = found["loss"] or (0, 0)
    assert (low, high) == (1.0, 3.0) and set(found) == {"loss", "accuracy"}


def test_labels_and_texts_have_intervals_of_their_own() -> None:
    wanted = ["a", "b"] * 50
    predicted = ["a", "b", "a", "a"] * 25
    texts = ["one two three", "something else"] * 20
    rows = {"loss_sum": [1.0] * 2, "loss_tokens": [1] * 2, "wanted": wanted, "predicted": predicted, "texts": texts}
    found = quality_intervals(rows | {"references": [["one two three"]] * 40})
    low, high = found["macro_f1"] or (0, 0)
    assert low < label_scores(wanted, predicted)["macro_f1"] < high and high - low < 0.25
    low, high = found["rouge_l"] or (0, 0)
    assert 30 < low < 50 < high < 70


def test_a_difference_of_the_same_rows_is_paired() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(10, 5, size=100).clip(1)
    one = {"loss_sum": list(hard + 0.1), "loss_tokens": [10] * 100}
    other = {"loss_sum": list(hard), "loss_tokens": [10] * 100}
    low, high = difference(one, other, "loss") or (0, 0)
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    same = {"label_right": [1.0, 0.0] * 20}
    assert difference(same, same, "accuracy") == (0.0, 0.0)


def test_texts_are_resampled_by_rows() -> None:
    references = [[f"the cat number {i} sat on the mat", f"cat {i} was on a mat"] for i in range(40)]
    good = [several[0] for several in references]
    worse = [text if i % 4 else "no idea at all" for i, text in enumerate(good)]
    found = text_tests({"base": worse, "good": good, "again": good}, references, "good")
    assert found["good"].intervals["chrf"] == pytest.approx((100, 100)) and found["good"].p_values == {}
    assert found["again"].p_values["chrf"] > 0.5 > 0.01 > found["base"].p_values["bleu"]
    for metric in ("bleu", "chrf"):
        low, high = found["base"].intervals[metric]
        assert low < text_scores(worse, references)[metric] < high
