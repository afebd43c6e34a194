"""Rows are chosen so that a sorted file does not mislead."""

from typing import Any, cast

from lorafleet.data.store import sample


def test_some_rows_of_a_sorted_file_are_from_all_of_it() -> None:
    rows = cast(Any, range(200))
    few, more = cast(list[int], sample(rows, 20)), cast(list[int], sample(rows, 50))
    assert len(few) == 20 and set(few) < set(more) and more == sorted(more)
    assert min(more) < 50 and max(more) >= 150
    assert sample(rows, 500) == [*rows]
