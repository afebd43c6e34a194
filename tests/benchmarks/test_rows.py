import numpy as np
import pytest

from benchmarks.job import IGNORED
from benchmarks.rows import Row, length_grouped, shuffled
from lorafleet.errors import DataError
from tests.benchmarks.jobs import tiny_rows
from tests.tiny import tiny_tokenizer


def some_rows(count: int) -> list[Row]:
    lengths = np.random.default_rng(1).integers(10, 200, count)
    return [{"input_ids": [number] * length, "labels": [number] * length} for number, length in enumerate(lengths)]


def batches_of(rows: list[Row], size: int) -> list[list[int]]:
    lengths = [len(row["input_ids"]) for row in rows]
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


def padding(batches: list[list[int]]) -> float:
    return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)


def test_labels_are_the_ids_of_the_answer_alone() -> None:
    tokenizer = tiny_tokenizer()
    for row in tiny_rows(8):
        assert len(row["input_ids"]) == len(row["labels"])
        trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        assert trained == [label for label in row["labels"] if label != IGNORED]
        answer = tokenizer.decode(trained)
        assert answer.rstrip().endswith("<|im_end|>")
        assert "user" not in answer
        assert row["labels"][0] == IGNORED


def test_length_grouped_batches_hardly_pad_and_cover_all_lengths() -> None:
    rows = some_rows(2000)
    chosen = batches_of(length_grouped(rows, 8, 10, seed=0), 8)
    assert len(chosen) == 10
    assert padding(chosen) < 0.1 < padding(batches_of(shuffled(rows, 80, seed=0), 8))
    means = sorted(np.mean(batch) for batch in chosen)
    assert means[0] < 50
    assert means[-1] > 160
    assert np.mean(means) == pytest.approx(np.mean([len(row["input_ids"]) for row in rows]), rel=0.1)
    # Not longest first: the warm-up steps would be unlike the rest.
    assert [np.mean(batch) for batch in chosen] != sorted((np.mean(batch) for batch in chosen), reverse=True)


def test_rows_follow_from_the_seed_and_differ_between_rounds() -> None:
    rows = some_rows(500)
    assert length_grouped(rows, 8, 5, seed=1) == length_grouped(rows, 8, 5, seed=1)
    assert length_grouped(rows, 8, 5, seed=1) != length_grouped(rows, 8, 5, seed=2)
    assert shuffled(rows, 40, seed=1) == shuffled(rows, 40, seed=1)
    assert shuffled(rows, 40, seed=1) != rows[:40]


def test_no_row_is_used_twice() -> None:
    chosen = length_grouped(some_rows(80), 8, 10, seed=0)
    assert len({row["input_ids"][0] for row in chosen}) == 80


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="needs 80 rows, --data has 79"):
        length_grouped(some_rows(79), 8, 10, seed=0)
    with pytest.raises(DataError, match="needs 80 rows"):
        shuffled(some_rows(79), 80, seed=0)
