"""BLEU, chrF and ROUGE-L against one or many references, against the packages' own single-text calls and by hand."""

import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lorafleet.evaluation.text_metrics import text_scores

TEXTS = ["The cat sat on the mat today.", "A small pub near the river."]
REFERENCES = [
    ["The cat sat on the mat.", "Today a cat was sitting on the mat."],
    ["There is a small pub near the river.", "Near the river is a pub.", "A little pub is by the river."],
]


def test_a_reference_itself_has_the_full_score() -> None:
    for texts in (["one two three four five"], ["今天天气很好，我们去公园散步吧。"]):
        assert text_scores(texts, [["something else entirely", texts[0]]]) == pytest.approx(
            {"bleu": 100, "chrf": 100, "rouge_l": 100}
        )
    nothing = text_scores(["zzz"], [["one two three four five"]])
    assert nothing["rouge_l"] == nothing["chrf"] == 0


def test_one_reference_each_equals_the_packages_own_calls() -> None:
    found = text_scores(TEXTS, [several[:1] for several in REFERENCES])
    first = [several[0] for several in REFERENCES]
    rouge = RougeScorer(["rougeL"])
    assert found["bleu"] == sacrebleu.corpus_bleu(TEXTS, [first]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(TEXTS, [first]).score
    pairs = zip(first, TEXTS, strict=True)
    assert found["rouge_l"] == pytest.approx(50 * math.fsum(rouge.score(a, b)["rougeL"].fmeasure for a, b in pairs))


def test_rows_may_have_different_numbers_of_references() -> None:
    found = text_scores(TEXTS, REFERENCES)
    # A missing reference counts for nothing, as a repeated one does.
    repeated = [[*several, several[0]][:3] for several in REFERENCES]
    assert found == pytest.approx(text_scores(TEXTS, repeated))
    assert all(found[name] > score for name, score in text_scores(TEXTS, [s[-1:] for s in REFERENCES]).items())


def test_rouge_counts_the_words_in_common_in_order() -> None:
    # 4 of 6 words and 4 of 5: F1 = 2·(4/6)·(4/5) / (4/6 + 4/5)
    found = text_scores(["the big dog sleeps all day"], [["the dog sleeps day long"]])
    assert found["rouge_l"] == pytest.approx(100 * 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))


def test_chinese_is_compared_by_characters() -> None:
    found = text_scores(["我们去公园散步"], [["我们去公园跑步"]])
    assert found["rouge_l"] == pytest.approx(100 * 6 / 7)
    assert found["bleu"] > 30
    assert text_scores(["été à Paris"], [["été à Lyon"]])["rouge_l"] == pytest.approx(100 * 2 / 3)
