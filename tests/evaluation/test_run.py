"""``evaluate`` and ``measure``: base and adapter on the same rows, with every number checked against its definition."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from lorafleet import evaluate, train
from lorafleet.config import AdapterConfig, DataConfig, GenerationConfig, ModelConfig
from lorafleet.data.load import load_data
from lorafleet.data.store import TokenRow
from lorafleet.errors import AdapterError, ConfigError, DataError
from lorafleet.evaluation.labels import label_log_probs
from lorafleet.evaluation.measure import measure, prompt_of, references_of, short_answer
from lorafleet.evaluation.metrics import mcnemar
from lorafleet.evaluation.text_metrics import text_scores
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.generation.adapted import Adapted, load_adapted
from tests.generation.tiny_bank import saved_adapter
from tests.tiny import tiny_base_folder

LABELS = ("good", "bad", "so so")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))


def label_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"movie number {i} was {i * 7 % 13}", "label": LABELS[i % 3]} for i in range(first, first + count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(adapter: Path) -> Adapted:
    return load_adapted(ModelConfig(device="cpu"), AdapterConfig(adapter=str(adapter)))


def plain_loss(adapted: Adapted, rows: Any) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(np.array(row.input_ids), dtype=torch.long)
        wanted = torch.tensor(np.array(row.loss_mask))
        with torch.no_grad():
            log_probs = adapted.base.model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= log_probs.gather(1, ids[1:, None])[:, 0][wanted[1:]].sum().item()
        count += int(wanted[1:].sum())
    return total / count


def test_label_rows(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, scale=0.3)
    folder = tmp_path / "rows"
    write_rows(folder / "train.jsonl", label_rows(6))
    write_rows(folder / "test.jsonl", label_rows(20, 6))
    file = tmp_path / "out" / "predictions.jsonl"
    result = evaluate(adapter=str(adapter), data=str(folder), predictions=str(file), batch_size=4, device="cpu")
    assert (result.split, result.rows, result.task) == ("test", 20, "label")
    adapted = opened(adapter)
    data = load_data(DataConfig(data=str(folder)), adapted.base.tokenizer)
    rows = list(data.splits["test"])
    assert result.metrics["adapter"]["loss"] == pytest.approx(plain_loss(adapted, rows), rel=1e-5)
    assert result.metrics["adapter"]["perplexity"] == pytest.approx(math.exp(result.metrics["adapter"]["loss"]))
    right = {}
    for name, slot in (("base", -1), ("adapter", 0)):
        prompts = [prompt_of(row) for row in rows]
        loss_model = LossModel(adapted.base.model, adapted.bank, pad_id=0)
        scores = label_log_probs(loss_model, slot, prompts, data.label_ids, batch_size=8)
        predicted = [data.labels[i] for i in scores.argmax(1)]
        wanted = [row.reference for row in rows]
        right[name] = [a == b for a, b in zip(predicted, wanted, strict=True)]
        assert result.metrics[name]["accuracy"] == np.mean(right[name])
        assert result.metrics[name]["macro_f1"] == f1_score(wanted, predicted, average="macro", zero_division=0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["adapter"]["label_right"] for line in lines] == right["adapter"]
    assert [line["base"]["label_right"] for line in lines] == right["base"]
    sums = [sum(line["adapter"][key] for line in lines) for key in ("loss_sum", "loss_tokens")]
    assert sums[0] / sums[1] == pytest.approx(result.metrics["adapter"]["loss"])
    assert lines[7]["adapter"]["loss_sum"] / lines[7]["adapter"]["loss_tokens"] == pytest.approx(
        plain_loss(adapted, rows[7:8]), rel=1e-5
    )
    assert lines[0]["source"].endswith("test.jsonl:1")
    assert "movie number 6 was 3" in lines[0]["prompt"]
    assert lines[0]["reference"] == "good"
    assert result.majority == {"label": "bad", "accuracy": 0.35}
    assert result.p_values["adapter_vs_base"] == mcnemar(right["adapter"], right["base"])
    assert json.loads(json.dumps(result.as_dict()))["metrics"] == result.metrics


def test_base_alone_and_adapter_alone(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(12))
    alone = evaluate(model=str(base), data=str(rows))
    assert list(alone.metrics) == ["base"]
    assert alone.p_values == {}
    assert (alone.split, alone.rows) == ("train", 12)
    both = evaluate(adapter=str(adapter), data=str(rows))
    assert both.metrics["base"] == pytest.approx(alone.metrics["base"], rel=1e-5)
    only = evaluate(adapter=str(adapter), data=str(rows), base=False)
    assert only.metrics == {"adapter": pytest.approx(both.metrics["adapter"], rel=1e-6)}
    assert list(only.p_values) == ["adapter_vs_majority"]
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate(model=str(base), data=str(rows), base=False)
    with pytest.raises(ConfigError, match="is a folder"):
        evaluate(model=str(base), data=str(rows), predictions=str(tmp_path))


def test_which_rows_are_measured(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(40))
    other = write_rows(tmp_path / "other.jsonl", label_rows(40, 40))
    _, adapter = saved_adapter(tmp_path, metadata={"data": {"data": str(rows)}})
    same = evaluate(adapter=str(adapter), data=str(rows), base=False)
    assert same.split == "valid"  # what training held out of this file
    assert same.rows < 10
    whole = evaluate(adapter=str(adapter), data=str(other), base=False)
    assert (whole.split, whole.rows) == ("train", 40)
    named = evaluate(adapter=str(adapter), data=str(other), base=False, split="valid")
    assert named.split == "valid"
    with pytest.raises(DataError, match="has no split 'test'"):
        evaluate(adapter=str(adapter), data=str(other), split="test")
    trained = evaluate(adapter=str(adapter), data=str(rows), base=False, valid_fraction=0.0)
    assert "trained on" in trained.warnings[0]


def test_the_rows_that_training_held_out_are_measured(tmp_path: Path) -> None:
    """Whatever share training held out, eval with its own defaults never takes trained rows for new ones."""
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(40))
    base = str(tiny_base_folder(tmp_path / "base", "llama"))
    for number, fraction in enumerate((0.25, 0.0)):
        adapter = str(tmp_path / f"run-{number}")
        train(model=base, data=str(rows), output_dir=adapter, max_steps=1, valid_fraction=fraction, max_rows=32)
        moved = tmp_path / f"moved-{number}.jsonl"
        moved.write_bytes(rows.read_bytes())
        found = evaluate(adapter=adapter, data=str(moved), base=False, predictions=str(tmp_path / "predictions.jsonl"))
        measured = {json.loads(line)["source"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()}
        config = DataConfig(data=str(moved), valid_fraction=fraction, max_rows=32)
        splits = load_data(config, opened(Path(adapter)).base.tokenizer).splits
        wanted = splits["valid" if fraction else "train"]
        assert measured == {row.source for row in wanted}
        assert bool(found.warnings) == (not fraction)
        other = evaluate(adapter=adapter, data=str(moved), base=False, split="valid", valid_fraction=0.5)
        assert "may have been trained on" in other.warnings[0] and f"valid_fraction = {fraction}" in other.warnings[0]


def test_the_limits_of_training_cut_the_held_out_rows_and_not_the_test_rows(tmp_path: Path) -> None:
    base, folder = str(tiny_base_folder(tmp_path / "base", "llama")), tmp_path / "set"
    write_rows(folder / "train.jsonl", [*label_rows(24), {"text": "", "label": "good"}])
    write_rows(folder / "test.jsonl", label_rows(12, 24))
    adapter = str(tmp_path / "run")
    train(model=base, data=str(folder), output_dir=adapter, max_steps=1, max_rows=8, on_bad_rows="skip")
    found = evaluate(adapter=adapter, data=str(folder), base=False, on_bad_rows="skip")
    assert (found.split, found.rows, found.warnings) == ("test", 12, ())
    held_out = evaluate(adapter=adapter, data=str(folder), base=False, split="valid")  # skips the bad row as then
    assert (held_out.rows, held_out.warnings) == (1, ())


def test_answers_are_generated_and_compared(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, scale=0.3)
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three\n#### 3"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns, "answer": "3"}] * 4)
    file = tmp_path / "predictions.jsonl"
    result = evaluate(adapter=str(adapter), data=str(rows), predictions=str(file), max_new_tokens=5)
    assert result.metrics["adapter"]["exact_match"] == 0.0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert set(lines[0]["adapter"]) == {"loss_sum", "loss_tokens", "text", "text_right", "text_complete"}
    assert lines[0]["references"] == ["3"]
    silent = evaluate(adapter=str(adapter), data=str(rows), answers=False)
    assert "exact_match" not in silent.metrics["adapter"]


def test_exact_match_counts_right_answers(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, scale=0.3)
    adapted = opened(adapter)
    questions = ["one two", "The quick fox", "the movie was bad"]
    settings = GenerationConfig(max_new_tokens=4)
    rows = [{"prompt": q, "completion": "x"} for q in questions]
    data = load_data(
        DataConfig(data=str(write_rows(tmp_path / "a.jsonl", rows)), valid_fraction=0), adapted.base.tokenizer
    )
    found: list[dict[str, Any]] = []
    measured = list(data.splits["train"])
    loss_model = LossModel(adapted.base.model, adapted.bank, adapted.base.tokenizer.pad_token_id)
    measure(adapted.base, loss_model, 0, data, measured, batch_size=2, generation=settings, predictions=found)
    rows[1]["completion"] = found[1]["text"] or "x"
    data = load_data(
        DataConfig(data=str(write_rows(tmp_path / "b.jsonl", rows)), valid_fraction=0), adapted.base.tokenizer
    )
    measured = list(data.splits["train"])
    metrics = measure(adapted.base, loss_model, 0, data, measured, batch_size=2, generation=settings)
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    wanted = text_scores([entry["text"] for entry in found], [[row.reference] for row in measured])
    assert {name: metrics[name] for name in ("bleu", "chrf", "rouge_l")} == wanted


def test_plain_text_has_loss_and_perplexity_only(tmp_path: Path) -> None:
    base, _ = saved_adapter(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"line number {i}"} for i in range(5)])
    result = evaluate(model=str(base), data=str(rows))
    assert set(result.metrics["base"]) == {"loss", "perplexity"}
    assert result.majority is None
    with pytest.raises(DataError, match="answers need rows with a prompt"):
        evaluate(model=str(base), data=str(rows), answers=True)


def test_prompts_are_those_of_training(tmp_path: Path) -> None:
    trained = {"prompt_template": "Rate: {text}", "system_prompt": "You rate.", "loss_on": "assistant", "data": "x"}
    _, adapter = saved_adapter(tmp_path, metadata={"data": trained, "labels": ["good", "bad"]})
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(3))
    file = tmp_path / "predictions.jsonl"
    result = evaluate(adapter=str(adapter), data=str(rows), predictions=str(file), base=False)
    prompt = json.loads(file.read_text().splitlines()[0])["prompt"]
    assert "You rate." in prompt
    assert "Rate: movie number 0" in prompt
    assert "adapter was trained with good, bad (2)" in result.warnings[0]
    evaluate(adapter=str(adapter), data=str(rows), predictions=str(file), base=False, prompt_template="Say: {text}")
    assert "Say: movie number 0" in json.loads(file.read_text().splitlines()[0])["prompt"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, metadata={"base_weights_hash": "0" * 64})
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(3))
    with pytest.raises(AdapterError, match="that it was trained on"):
        evaluate(adapter=str(adapter), data=str(rows))


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path)
    adapted = opened(adapter)
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(3))
    data = load_data(DataConfig(data=str(rows), valid_fraction=0), adapted.base.tokenizer)
    loss_model = LossModel(adapted.base.model, adapted.bank, adapted.base.tokenizer.pad_token_id)
    with pytest.raises(DataError, match="no rows"):
        measure(adapted.base, loss_model, 0, data, [], batch_size=2)


def test_references_of_a_row() -> None:
    ids, mask = np.array([1, 2], dtype=np.int32), np.array([False, True])
    plain = TokenRow(ids, mask, "x:1", 1, "text")
    assert (short_answer(plain), references_of(plain)) == (None, ["text"])
    several = TokenRow(ids, mask, "x:1", 1, "a", ("a", "b"), "a\nb")
    assert (short_answer(several), references_of(several)) == (None, ["a", "b"])
    number = TokenRow(ids, mask, "x:1", 1, "work #### 3", (), "3")
    assert (short_answer(number), references_of(number)) == ("3", ["3"])


def test_the_rows_are_read_as_in_training_and_a_valid_file_is_measured_whole(tmp_path: Path) -> None:
    base, folder = str(tiny_base_folder(tmp_path / "base", "llama")), tmp_path / "set"
    for number, name in enumerate(("train", "valid", "test")):
        write_rows(folder / f"{name}.jsonl", label_rows(12, 12 * number))
    adapter = str(tmp_path / "run")
    train(model=base, data=str(folder), output_dir=adapter, max_steps=1, max_rows=4, data_format="text")
    found = evaluate(adapter=adapter, data=str(folder), base=False)
    assert (found.split, found.rows, found.task) == ("test", 12, "text")
    valid = evaluate(adapter=adapter, data=str(folder), base=False, split="valid")
    assert (valid.rows, valid.task, valid.warnings) == (12, "text", ())
