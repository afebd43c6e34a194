"""Starts that move the base in PEFT (PiSSA, OLoRA): here they leave it, and cross over as plain LoRA of rank 2r."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lorafleet.config import LoraConfig
from lorafleet.errors import ConfigError
from lorafleet.files.adapter import load_adapter
from lorafleet.lora import inject_lora
from tests.files.test_peft_interop import (
    NAMES,
    assert_close,
    bank_logits,
    load_in_peft,
    logits,
    randomize,
    save,
)
from tests.tiny import ARCHITECTURES, tiny_model

STARTS = ("pissa", "olora")
# PEFT 0.21 decomposes the transposed weight of GPT-2's Conv1D, and then B has the shape of A.
PEFTS = [(arch, start) for arch in ARCHITECTURES for start in STARTS if (arch, start) != ("gpt2", "olora")]


def knobs(arch: str, start: str, rslora: bool = False) -> dict[str, Any]:
    attention, mlp, _ = NAMES[arch]
    patterns = {"rank_pattern": {attention: 3}, "alpha_pattern": {mlp: 5}}
    targets = {"target_modules": [attention, mlp]}
    return {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "init_lora_weights": start, **patterns, **targets}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_fresh_adapter_starts_as_pefts_and_answers_as_the_base(arch: str, start: str) -> None:
    bank = inject_lora(tiny_model(arch), LoraConfig(**knobs(arch, start)))
    wanted = logits(tiny_model(arch))
    assert (bank_logits(bank) - wanted).abs().max() <= 1e-6 * wanted.abs().max()

    if (arch, start) not in PEFTS:
        return
    theirs = peft.get_peft_model(tiny_model(arch), peft.LoraConfig(task_type="CAUSAL_LM", **knobs(arch, start)))
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    ours = bank.slot_parameters(0)
    assert len(ours) == len(state) > 0
    for name, one in ours.items():
        value = state[f"base_model.model.{name}.weight"]
        torch.testing.assert_close(one.value if name.endswith("A") else one.value.T, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ours_in_peft_and_back(arch: str, start: str, rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(**knobs(arch, start, rslora))
    bank = inject_lora(tiny_model(arch), config)
    for number, one in enumerate(bank.slot_parameters(0).values()):
        one.value.copy_(randomize({"": one.value}, seed=number)[""])
    wanted = bank_logits(bank)
    assert (wanted - logits(tiny_model(arch))).abs().max() > 1e-2 * wanted.abs().max()
    save(bank, config, tmp_path)
    assert_close(logits(load_in_peft(arch, tmp_path)), wanted)

    adapter = load_adapter(tmp_path)
    assert adapter.config.r == 8
    again = inject_lora(tiny_model(arch), adapter.config)
    again.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(again), wanted)


@pytest.mark.parametrize(("arch", "start"), PEFTS)
def test_pefts_here(arch: str, start: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(knobs(arch, start) | {"rank_pattern": {}, "alpha_pattern": {}}))
    model = peft.get_peft_model(tiny_model(arch), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide does, before both savings
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    state = randomize(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    peft.set_peft_model_state_dict(model, state)
    wanted = logits(model.eval())
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(
        tmp_path / "plain", save_embedding_layers=False, path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    adapter = load_adapter(tmp_path / "plain")
    bank = inject_lora(tiny_model(arch), adapter.config)
    bank.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(bank), wanted)


def test_training_changes_the_trained_half_alone() -> None:
    bank = inject_lora(tiny_model("llama"), LoraConfig(r=2, init_lora_weights="pissa"))
    before = bank.state_dict(0)
    for one in bank.slot_parameters(0).values():
        one.value.add_(1)
    for name, tensor in bank.state_dict(0).items():
        rows = tensor if "lora_A" in name else tensor.T
        old = before[name] if "lora_A" in name else before[name].T
        assert torch.equal(rows[2:], old[2:])
        assert torch.equal(rows[:2], old[:2] + 1)


def test_a_rank_that_the_layer_has_not_is_refused() -> None:
    config = LoraConfig(r=20, init_lora_weights="pissa", target_modules=["q_proj", "k_proj"])
    with pytest.raises(ConfigError, match="needs a rank of at most 16 for model.layers.0.self_attn.k_proj, not 20"):
        inject_lora(tiny_model("llama"), config)
