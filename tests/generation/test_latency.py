"""A slot's latency beside the base's."""

import pytest
import torch

from lorafleet.generation import latency
from lorafleet.lora import BASE_ONLY
from tests.generation.tiny_bank import tiny_base, trained_bank


def test_the_base_and_the_slot_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    bank = trained_bank(base)
    bank.eval()
    measured: list[int] = []
    seconds = {BASE_ONLY: 2.0, 1: 3.0}

    def decode(_base: object, _bank: object, slot: int, ids: torch.Tensor) -> float:
        decoded(base, bank, slot, ids)
        measured.append(slot)
        return seconds[slot]

    decoded = latency._decode
    monkeypatch.setattr(latency, "_decode", decode)
    assert latency.relative_latency(base, bank, 1) == 1.5
    assert measured == [BASE_ONLY, 1] + [1, BASE_ONLY] * latency.PAIRS
