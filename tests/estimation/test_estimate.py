"""``estimate``: what it says of a method is what the method is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import lorafleet
from lorafleet.cli.commands import app
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import parse_methods
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.data.batches import Part, Schedule, collate
from lorafleet.errors import ConfigError, DataError
from lorafleet.estimation.memory import base_bytes, file_bytes, trained_bytes, training_memory
from lorafleet.estimation.result import Estimate
from lorafleet.estimation.run import _lay_out
from lorafleet.estimation.step import step_cost
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.methods.method import Method, find_methods
from lorafleet.models.load import load_base, load_meta_model
from tests.tiny import tiny_config
from tests.training.test_resume import make_place

METHODS = (
    "full,lora:r=2,dora:r=2,lora_dropout=0.1,pissa:r=2,prefix:num_virtual_tokens=2,bottleneck:bottleneck_size=4,ia3,"
    "p_tuning:num_virtual_tokens=2,vera:r=4,lora:r=2,target_modules=embed_tokens"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("estimate"))


def settings(place: Path, **knobs: Any) -> dict[str, Any]:
    model, data = str(place / "base"), str(place / "rows.jsonl")
    return {"model": model, "data": data, "max_steps": 4, "device": "cpu", "methods": METHODS, **knobs}


@pytest.fixture(scope="module")
def found(place: Path) -> Estimate:
    return lorafleet.estimate(settings(place, tasks=7))


def methods(words: str = METHODS) -> list[Method]:
    return find_methods(parse_methods(words), LoraConfig(), TrainingConfig())


def test_parameters_are_those_of_the_method_itself(place: Path, found: Estimate) -> None:
    config = ModelConfig(model_name_or_path=str(place / "base"), device="cpu")
    for method, one in zip(methods(), found.methods, strict=True):
        base = load_base(config)
        assert found.total_parameters == sum(p.numel() for p in base.model.parameters())
        slots = method.start(base.model, 0)
        trained = sum(parameter.value.numel() for parameter in slots.slot_parameters(0).values())
        assert (one.name, one.trainable_parameters) == (method.name, trained)
        assert one.storage_bytes == sum(tensor.nbytes for tensor in slots.state_dict(0).values())
        assert one.tasks_bytes == 7 * one.storage_bytes + (0 if one.kind == "full" else found.base_bytes)


def test_memory_has_parts_that_add_up(found: Estimate) -> None:
    for one, plain in zip(found.methods, found.as_dict()["methods"], strict=True):
        parts = one.memory
        assert all(size >= 0 for size in vars(parts).values())
        assert plain["memory"]["total"] == sum(vars(parts).values()) == parts.total
        assert parts.optimizer == 2 * parts.gradients == 2 * parts.best == 8 * one.trainable_parameters
        assert one.fits["this machine"] == ["float32"]
        assert one.seconds > 0 and one.steps == 4
    full, lora = found.methods[:2]
    assert full.by_precision["int8"] is None and full.by_precision["nf4"] is None
    wide = [lora.by_precision[name] for name in ("float32", "bfloat16", "int8", "nf4")]
    assert wide == sorted(wide, key=lambda size: -(size or 0))
    assert lora.flops_per_token < full.flops_per_token  # no gradients of the base's weights


def test_a_pass_without_values_holds_what_a_real_one_does(place: Path) -> None:
    """What autograd keeps of a real pass is what the meta device says; the real model is a CPU's, in padded batches."""
    base = load_base(ModelConfig(model_name_or_path=str(place / "base"), device="cpu"))
    (method,) = methods("prefix:num_virtual_tokens=2")
    rows = [base.tokenizer(f"row {'x ' * n}", return_tensors="np") for n in (3, 9)]
    batch = [_Row(row["input_ids"][0]) for row in rows]
    slots = method.start(base.model, 0)
    held = _saved_bytes(LossModel(base.model, slots, 0), batch)
    bare: Any = load_meta_model(ModelConfig(model_name_or_path=str(place / "base")))
    cost = step_cost(bare, method.start(bare, 0), batch)
    assert cost.tokens == sum(len(row.input_ids) - 1 for row in batch)
    assert held <= cost.kept_bytes * 1.05
    assert cost.kept_bytes <= held * 1.35  # what no backward pass needs, as inputs, is held too


def test_a_second_look_counts_the_same() -> None:
    model = _bare("llama")
    slots = methods("lora:r=2")[0].start(model, 0)
    assert step_cost(model, slots, [_Row(np.arange(40))]) == step_cost(model, slots, [_Row(np.arange(40))])


def test_products_are_laid_out_where_training_lays_them_out() -> None:
    """All weights of LoRA's layers and the head; the head alone of other methods; nothing where all of it trains."""
    laid_out = []
    for method in methods("lora:r=2,bottleneck,full"):
        model = _bare("llama")
        cost = step_cost(model, method.start(model, 0), [_Row(np.arange(40))])
        laid_out.append(sum(flops for shape, flops in cost.products.items() if shape.laid_out) / cost.flops)
    lora, bottleneck, full = laid_out
    assert 0.5 < lora < 1 and 0 < bottleneck < lora and full == 0


def test_gradients_of_earlier_micro_batches_are_there() -> None:
    """With accumulation all of them are held while the next pass has all its activations."""
    model = _bare("llama")
    slots = methods("full")[0].start(model, 0)
    once, more = (step_cost(model, slots, [_Row(np.arange(40))], again=again) for again in (False, True))
    assert once.peak_bytes < more.peak_bytes <= once.peak_bytes + trained_bytes(slots)
    assert once.flops == more.flops and not any(
        one.parameter.grad is not None for one in slots.slot_parameters(0).values()
    )


def test_logits_that_a_model_scales_are_held_for_all_tokens() -> None:
    row = _Row(np.arange(40))
    row.loss_mask = row.input_ids >= 38
    plain, scaled = (
        step_cost(model, methods("lora:r=2")[0].start(model, 0), [row])
        for model in (_bare("llama"), _bare("granite", logits_scaling=8.0))
    )
    one = 39 * 512 * 4
    assert plain.logits_bytes < one < 2 * one <= scaled.logits_bytes


def test_each_token_meets_as_many_experts_as_it_is_given() -> None:
    own = {"moe_intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 2}
    costs = []
    for count in (1, 2):
        model = _bare("qwen3_moe", num_experts=4, num_experts_per_tok=count, **own)
        costs.append(step_cost(model, methods("lora:r=2")[0].start(model, 0), [_Row(np.arange(40))]))
    # Forward, and backward for the input: two passes of 39 tokens through 3 matrices of 32 x 16 in 2 layers.
    assert costs[1].flops - costs[0].flops == 2 * 2 * 39 * 3 * 32 * 16 * 2


def _bare(arch: str, **overrides: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(arch, **overrides))


def test_the_worst_batch_of_padded_rows_has_the_longest() -> None:
    lengths = np.array([200] * 8 + [50] * 7 + [1000], dtype=np.int32)
    training = TrainingConfig(max_steps=4)
    flat, padded = (_lay_out(training, lengths, padded=padded) for padded in (False, True))
    assert flat.batches == padded.batches == 4 and flat.mean_tokens == padded.mean_tokens
    assert 15 in padded.largest and padded.largest_tokens <= flat.largest_tokens


def test_all_micro_batches_are_the_schedule_s() -> None:
    lengths = np.arange(1, 24, dtype=np.int32)
    training = TrainingConfig(max_steps=7, per_device_train_batch_size=2, gradient_accumulation_steps=5)
    schedule = Schedule(23, 2, 5, training.seed)
    batches = [batch for step in range(7) for batch in schedule.window(step)]
    found = _lay_out(training, lengths, padded=False)
    assert found.batches == len(batches) and found.mean_tokens == np.mean([lengths[b].sum() for b in batches])


def test_weights_that_no_file_holds_stay_beside_their_layouts() -> None:
    model = _bare("llama")
    slots = methods("lora:r=2")[0].start(model, 0)
    cost = step_cost(model, slots, [_Row(np.arange(9))])
    kept, gone = (
        training_memory(model, slots, cost, "float32", 0, on_cpu=True, mapped=mapped).weights
        for mapped in (False, True)
    )
    assert kept - gone == sum(layer.weight.nbytes for layer in slots.layers.values())


def test_what_cannot_run_without_values_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(*_: Any, **__: Any) -> None:
        raise RuntimeError("Cannot copy out of meta tensor\nmore")

    monkeypatch.setattr("lorafleet.estimation.run.step_cost", looks)
    with pytest.raises(ConfigError, match=r"without values \(RuntimeError: Cannot copy out of meta tensor\)"):
        lorafleet.estimate(settings(place, methods="lora"))


def test_bytes_by_precision() -> None:
    from tests.tiny import tiny_model

    model = tiny_model("llama")
    slots = methods("lora:r=2")[0].start(model, 0)
    linear = sum(layer.weight.numel() for layer in slots.layers.values())  # type: ignore[attr-defined]
    others = sum(p.numel() for p in model.parameters()) - linear - trained_bytes(slots) // 4
    assert base_bytes(model, slots, "float32") == 4 * (linear + others)
    assert base_bytes(model, slots, "nf4") == pytest.approx(linear * 0.516 + 4 * others, abs=linear * 1e-3)
    assert file_bytes(slots) == trained_bytes(slots)


def test_faults_are_told_together_before_anything_is_counted(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)there is no such method; did you mean 'lora'.*rang") as caught:
        lorafleet.estimate(settings(place, methods="lorra,lora:rang=3"))
    assert str(caught.value).count("method ") == 2
    with pytest.raises(ConfigError, match="matches no linear layer"):
        lorafleet.estimate(settings(place, methods="lora:target_modules=q_prj"))
    with pytest.raises(ConfigError, match="tasks"):
        lorafleet.estimate(settings(place, tasks=0))
    with pytest.raises(DataError, match="there is no file or folder"):
        lorafleet.estimate(settings(place, data=str(place / "none.jsonl")))


def test_the_command_shows_it(place: Path) -> None:
    arguments = ["estimate", "--model", str(place / "base"), "--data", str(place / "rows.jsonl"), "--device", "cpu"]
    arguments += ["--methods", "full,lora:r=2", "--max-steps", "4"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    for words in ("lora:r=2", "activations", "80 GB", "100 tasks", "tokens/s"):
        assert words in shown.stdout
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(printed.stdout)["methods"][1]["name"] == "lora:r=2"


class _Row:
    def __init__(self, ids: Any) -> None:
        self.input_ids, self.loss_mask = ids, ids >= 0


def _saved_bytes(loss_model: LossModel, rows: list[Any]) -> int:
    """Bytes of what autograd keeps of a real pass, each memory once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in loss_model.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss_model.losses(collate([Part(0, rows)]))[0]
    assert total.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
