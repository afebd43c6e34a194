"""Scores against hand-made cases."""

from decimal import Decimal

import pytest

from lorafleet.evaluation.metrics import final_number, is_right, label_scores, majority, mcnemar, number_of


def test_label_scores() -> None:
    scores = label_scores(["a", "a", "b", "c"], ["a", "b", "b", "b"])
    assert scores["accuracy"] == 0.5
    # F1: a = 2·1·½/(1+½) = ⅔, b = 2·⅓·1/(⅓+1) = ½, c = 0
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_majority() -> None:
    assert majority(["b", "a", "b"]) == ("b", pytest.approx(2 / 3))
    assert majority(["b", "a"]) == ("a", 0.5)


def test_mcnemar_is_the_exact_binomial() -> None:
    first = [True] * 9 + [False] + [True] * 50
    second = [False] * 9 + [True] + [True] * 50
    assert mcnemar(first, second) == pytest.approx(2 * (10 + 1) / 2**10)  # 2·P(X ≤ 1), n = 10
    assert mcnemar([True, False], [True, False]) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples and 4 pears, 7 in all.", "7"),
        ("so 48/2 = 24.\n#### 24", "24"),
        ("#### 1,234.50 dollars, not 9", "1234.50"),
        ("#### 5\nNext: #### 6 or 7", "6"),
        ("it costs $-3", "-3"),
        ("3-4", "4"),
        ("共１２个", "12"),
        ("no digits", None),
        ("first 8 #### none", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("reference", "number"),
    [("18", "18"), ("1,000", "1000"), ("$5.00", "5"), ("Adds 2 and 3.\n#### 5", "5"), ("5 apples", None), ("", None)],
)
def test_number_of(reference: str, number: str | None) -> None:
    assert number_of(reference) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "references", "right"),
    [
        ("The answer is 18.0", ["18"], True),
        ("18 then 19", ["18"], False),
        ("work\n#### 18", ["long other work\n#### 18"], True),
        (" Paris. ", ["london", "PARIS"], True),
        ("Paris, France", ["Paris"], False),
        ("北京。", ["北京"], True),
        ("two  words\n", ["Two words"], True),
        ("?", ["!"], False),
        ("", ["x"], False),
    ],
)
def test_is_right(text: str, references: list[str], right: bool) -> None:
    assert is_right(text, references) is right
