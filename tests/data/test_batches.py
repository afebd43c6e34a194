"""Order, windows and flat batches."""

import numpy as np
import pytest
import torch

from lorafleet.data.batches import Part, Schedule, collate, count_targets
from tests.evaluation.test_token_loss import Row


@pytest.mark.parametrize(("rows", "batch", "accumulation"), [(10, 2, 1), (11, 2, 3), (5, 8, 2), (7, 3, 2)])
def test_every_epoch_uses_every_row_once_in_its_own_order(rows: int, batch: int, accumulation: int) -> None:
    schedule = Schedule(rows, batch, accumulation, seed=4)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        windows = [schedule.window(step) for step in steps]
        assert all(1 <= len(window) <= accumulation and max(map(len, window)) <= batch for window in windows)
        epochs.append([row for window in windows for micro in window for row in micro])
        assert sorted(epochs[-1]) == list(range(rows))
    assert epochs[0] != epochs[1]
    assert schedule.window(3) == Schedule(rows, batch, accumulation, seed=4).window(3)
    assert [Schedule(rows, batch, accumulation, seed=5).window(s) for s in range(4)] != [
        schedule.window(s) for s in range(4)
    ]


def test_total_steps_by_epochs_or_steps() -> None:
    schedule = Schedule(rows=11, batch_size=2, accumulation=3, seed=0)
    assert schedule.steps_per_epoch == 2
    assert schedule.total_steps(epochs=2.5, max_steps=None) == 5
    assert schedule.total_steps(epochs=2.5, max_steps=17) == 17


def test_a_flat_batch_points_each_target_at_the_token_before_it() -> None:
    rows = [
        Row(np.array([5, 6, 7, 8]), np.array([True, False, True, True])),
        Row(np.array([9, 10]), np.array([False, True])),
    ]
    batch = collate([Part(1, rows, weight=0.25), Part(-1, rows[:1])])
    assert batch.input_ids.tolist() == [9, 5, 6, 7, 5, 6, 7]
    assert batch.lengths == (1, 3, 3)
    assert batch.position_ids.tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert batch.positions.tolist() == [0, 2, 3, 5, 6]
    assert batch.targets.tolist() == [10, 7, 8, 7, 8]
    assert batch.weights.tolist() == [0.25] * 3 + [1.0] * 2
    assert batch.part_targets == (3, 2)
    assert (count_targets(rows), batch.tokens) == (3, 7)
    assert batch.routing(None, padded=False).lengths == (4, 3)
    assert batch.routing(None, padded=True).lengths == (2, 1)
    assert batch.shared_prompts() is None


def test_a_row_ends_before_its_last_target() -> None:
    rows = [
        Row(np.array([5, 6, 7, 8, 9]), np.array([False, True, True, False, False])),
        Row(np.array([5, 6, 7]), np.array([True, False, False])),
    ]
    batch = collate([Part(0, rows)])
    assert batch.input_ids.tolist() == [5, 5, 6]
    assert (batch.positions.tolist(), batch.targets.tolist()) == ([1, 2], [6, 7])


def test_what_all_rows_of_a_part_begin_with_is_computed_once() -> None:
    mask = np.array([False, True, False, True])
    rows = [Row(np.array([5, 6, 7, 8]), mask), Row(np.array([5, 6, 7]), mask[:3]), Row(np.array([5, 6, 9, 9]), mask)]
    batch = collate([Part(1, rows), Part(0, rows[:1])])
    assert batch.common == (0, 1, 1, 0)
    shared = batch.shared_prompts()
    assert shared is not None
    assert batch.input_ids[shared.kept].tolist() == [5, 6, 7, 6, 9, 5, 6, 7]
    torch.testing.assert_close(batch.input_ids[shared.kept][shared.place], batch.input_ids)
    torch.testing.assert_close(batch.position_ids[shared.kept][shared.place], batch.position_ids)
    assert batch.routing(shared, padded=False).lengths == (5, 3)
    assert batch.shared_prompts(apart=[1]) is None


def test_parts_of_one_slot_begin_as_the_part_before_and_share_a_segment() -> None:
    def row(*ids: int) -> Row:
        return Row(np.array([*ids, 0]), np.array([False] * len(ids) + [True]))

    parts = [[row(5, 6, 7, 8), row(5, 6, 7, 9)], [row(5, 6, 3, 1), row(5, 6, 3, 2)], [row(5, 6, 3, 2)]]
    batch = collate([*(Part(0, rows) for rows in parts), Part(1, parts[2])])
    assert batch.common == (0, 3, 2, 3, 4, 0)
    shared = batch.shared_prompts()
    assert shared is not None
    assert batch.input_ids[shared.kept].tolist() == [5, 6, 7, 8, 9, 3, 1, 2, 5, 6, 3, 2]
    torch.testing.assert_close(batch.input_ids[shared.kept][shared.place], batch.input_ids)
    routing = batch.routing(shared, padded=False)
    assert (routing.slots, routing.lengths) == ((0, 1), (8, 4))
    assert batch.routing(None, padded=True).lengths == (5, 1)

    apart = collate([Part(0, parts[2], dropout_key=key) for key in (1, 2)])
    assert apart.common == (0, 0)
    assert apart.routing(None, padded=False).lengths == (4, 4)

    x = torch.randn(len(shared.kept), 3, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(batch.tokens, 3, dtype=torch.float64)
    (shared.expand(x) * factors).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x).index_add_(0, shared.place, factors))


def test_a_common_beginning_that_saves_next_to_nothing_is_left_alone() -> None:
    rows = [
        Row(np.array([1, *range(10, 60)]), np.ones(51, bool)),
        Row(np.array([1, *range(60, 80)]), np.ones(21, bool)),
    ]
    assert collate([Part(0, rows)]).common == (0, 0)


def test_equal_rows_are_computed_once() -> None:
    rows = [Row(np.array([5, 6, 7]), np.array([False, True, True]))] * 3
    shared = collate([Part(0, rows)]).shared_prompts()
    assert shared is not None
    assert shared.kept.tolist() == [0, 1]


def test_a_padded_batch_keeps_ids_and_targets() -> None:
    rows = [
        Row(np.array([5, 6, 7, 8]), np.array([False, False, True, True])),
        Row(np.array([9, 10]), np.array([False, True])),
    ]
    batch = collate([Part(0, rows)])
    ids, mask, positions = batch.padded(pad_id=99)
    assert ids.tolist() == [[9, 99, 99], [5, 6, 7]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert (positions.tolist(), batch.targets.tolist()) == ([0, 4, 5], [10, 7, 8])
