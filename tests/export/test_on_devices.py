"""Generation, label scoring and merging on every device of this machine."""

from pathlib import Path

import pytest
import torch

from lorafleet import merge
from lorafleet.config import AdapterConfig, GenerationConfig, ModelConfig
from lorafleet.evaluation.labels import choose_labels, label_log_probs
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.generation import generate_ids
from lorafleet.generation.adapted import load_adapted
from tests.generation.tiny_bank import saved_adapter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROMPTS = [[7, 8, 9, 11], [7, 8, 30], [7, 8, 9, 10, 11, 12, 13, 14]]
LABELS = [[20, 21, 2], [20, 22, 23, 2], [24, 2], [25, 26, 27, 28, 2]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_use_of_an_adapter(device: str, dtype: str, tmp_path: Path) -> None:
    _, folder = saved_adapter(tmp_path, scale=0.1)
    adapted = load_adapted(ModelConfig(device=device, dtype=dtype), AdapterConfig(adapter=str(folder)))  # type: ignore[arg-type]
    base, bank = adapted.base, adapted.bank
    config = GenerationConfig(max_new_tokens=6, temperature=0.8, repetition_penalty=1.1)
    answers = generate_ids(base, bank, PROMPTS, [0, -1, 0], config)
    assert all(len(answer) <= 6 for answer in answers)
    loss_model = LossModel(base.model, bank, pad_id=0)
    choices = choose_labels(base, loss_model, 0, PROMPTS, LABELS, batch_size=2)
    scores = label_log_probs(loss_model, 0, PROMPTS, LABELS, batch_size=4)
    tolerance = 1e-3 if dtype == "float32" else 0.3
    for choice, row in zip(choices, scores, strict=True):
        assert choice.log_prob == pytest.approx(row.max(), abs=tolerance)
        assert row[choice.label] == pytest.approx(row.max(), abs=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_merge(device: str, dtype: str, tmp_path: Path) -> None:
    _, folder = saved_adapter(tmp_path, scale=0.05)
    result = merge(
        adapter=str(folder), output_dir=str(tmp_path / "merged"), device=device, dtype=dtype, merge_dtype=dtype
    )
    assert result.logits_difference <= result.tolerance
