"""How many adapters fit into the memory that is free."""

from collections.abc import Callable

import pytest
import torch

from lorafleet.config.lora import LoraConfig
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import inject_lora
from lorafleet.models.machine import memory_of
from lorafleet.training import capacity
from lorafleet.training.capacity import adapters_that_fit
from tests.evaluation.test_token_loss import make_rows
from tests.tiny import tiny_model


@pytest.fixture
def loss_model() -> LossModel:
    model = tiny_model("llama")
    bank = inject_lora(model, [LoraConfig(r=2), LoraConfig(r=2)])
    return LossModel(model, bank, 0)


@pytest.mark.parametrize(
    ("one", "two", "wanted", "tokens", "fitting"),
    [
        (100, 130, 1, 8, (15, 15)),
        (100, 130, 15, 8, (15, 15)),
        (100, 130, 16, 8, (16, 15)),
        (100, 130, 40, 8, (40, 7)),
        (100, 130, 1000, 8, (60, 1)),
        (100, 100, 1000, 8, (60, 60)),
        (900, 1200, 16, 8, (1, 1)),
        (None, None, 16, 8, (1, 1)),
        (100, 130, 1, 100, (11, 11)),
        (100, 130, 16, 100, (16, 11)),
        (100, 130, 40, 100, (40, 7)),
        (100, 100, 16, 100, (16, 11)),
        (100, 130, 1, 5000, (1, 1)),
        (100, 130, 4, 5000, (4, 1)),
        (20, None, 16, 100, (16, 11)),  # there is room for more than the eleven that share a pass
        (50, 65, 40, 100, (40, 11)),
    ],
)
def test_what_the_second_needs_more_is_what_each_further_one_needs(
    loss_model: LossModel,
    monkeypatch: pytest.MonkeyPatch,
    one: int | None,
    two: int | None,
    wanted: int,
    tokens: float,
    fitting: tuple[int, int],
) -> None:
    needs = iter([one, two] if two else [one])  # without a second figure none is asked for
    monkeypatch.setattr(capacity, "memory_of", lambda run, device: (run(), next(needs))[1])
    monkeypatch.setattr(capacity, "free_memory_bytes", lambda device: 1000)
    asked = {"slot_bytes": 2, "share": 0.7, "wanted": wanted, "tokens": tokens}
    assert adapters_that_fit(loss_model, make_rows(1), (0, 1), **asked) == fitting
    assert loss_model.bank is not None
    assert all(one.grad is None for one in loss_model.bank.slot_parameters(0).values())


def test_the_memory_of_a_call_is_what_it_held_at_most() -> None:
    def fill(megabytes: int) -> Callable[[], object]:
        return lambda: torch.ones(megabytes << 18).sum()  # float32

    small, large = (memory_of(fill(size), torch.device("cpu")) for size in (32, 256))
    if small is None or large is None:
        assert not torch.cuda.is_available()
        return
    assert 20 << 20 < small < 120 << 20
    assert 200 << 20 < large < 400 << 20
