"""Adapters cross over: what lorafleet saves gives the same logits in PEFT, and what PEFT saves the same logits here."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafleet.config import LoraConfig
from lorafleet.errors import ConfigError
from lorafleet.files.adapter import Adapter, load_adapter, save_adapter
from lorafleet.lora import LoraBank, Routing, inject_lora, without_absent
from tests.tiny import ARCHITECTURES, tiny_model

IDS = torch.tensor([[5, 9, 200, 33, 71, 400, 3, 18]])

# A module of attention and one of the MLP by their last names, per architecture.
NAMES = {
    "llama": ("q_proj", "down_proj", "model.norm"),
    "qwen2": ("q_proj", "down_proj", "model.norm"),
    "qwen3": ("q_proj", "down_proj", "model.norm"),
    "gemma": ("q_proj", "down_proj", "model.norm"),
    "mistral": ("q_proj", "down_proj", "model.norm"),
    "phi": ("q_proj", "fc2", "final_layernorm"),
    "gpt2": ("c_attn", "mlp.c_proj", "ln_f"),
    "opt": ("q_proj", "fc2", "final_layer_norm"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h", "final_layer_norm"),
}

SHAPES: dict[str, Any] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": "attention: 3"},
    "alpha pattern": {"alpha_pattern": "mlp: 5"},
    "both patterns, rslora": {"rank_pattern": "attention: 3", "alpha_pattern": "mlp: 5", "use_rslora": True},
    "saved module": {"modules_to_save": "norm"},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "bias all, saved module": {"bias": "all", "modules_to_save": "norm"},
    "mlp only": {"target_modules": "mlp"},
    "one layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": "attention"},
    "dora": {"use_dora": True},
    "dora, patterns, rslora": {"use_dora": True, "rank_pattern": "attention: 3", "use_rslora": True},
}


def knobs_of(arch: str, shape: str) -> dict[str, Any]:
    attention, mlp, norm = NAMES[arch]
    fields = dict(SHAPES[shape])
    if "rank_pattern" in fields:
        fields["rank_pattern"] = {attention: 3}
    if "alpha_pattern" in fields:
        fields["alpha_pattern"] = {mlp: 5}
    if "modules_to_save" in fields:
        fields["modules_to_save"] = [norm]
    if "exclude_modules" in fields:
        fields["exclude_modules"] = [attention]
    return {"r": 4, "lora_alpha": 6, **fields}


def randomize(tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def filled_bank(arch: str, config: LoraConfig) -> LoraBank:
    bank = inject_lora(tiny_model(arch), config)
    bank.load_state_dict(0, randomize(bank.state_dict(0)))
    return bank


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def bank_logits(bank: LoraBank) -> Tensor:
    with bank.route(Routing((0,), (IDS.numel(),))):
        return logits(bank.model)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def load_in_peft(arch: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")  # whoever targets a tied table, is told
        return peft.PeftModel.from_pretrained(tiny_model(arch), folder)


def save(bank: LoraBank, config: LoraConfig, folder: Path) -> None:
    conv1d = any(isinstance(layer.base_layer, Conv1D) for layer in bank.layers.values())
    save_adapter(folder, config, bank.state_dict(0), base_name="tiny", metadata={}, fan_in_fan_out=conv1d)


def crosses_over(arch: str, config: LoraConfig, folder: Path) -> Adapter:
    """What is saved here gives the same logits in PEFT, and bit for bit the same here again."""
    bank = filled_bank(arch, config)
    wanted = bank_logits(bank)
    assert (wanted - logits(tiny_model(arch))).abs().max() > 0.01
    save(bank, config, folder)
    assert_close(logits(load_in_peft(arch, folder)), wanted)

    adapter = load_adapter(folder)
    again = inject_lora(tiny_model(arch), adapter.config)
    again.load_state_dict(0, adapter.tensors)
    assert torch.equal(bank_logits(again), wanted)
    assert set(again.layers) == set(bank.layers)
    return adapter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ours_in_peft_and_back(arch: str, shape: str, tmp_path: Path) -> None:
    adapter = crosses_over(arch, LoraConfig(**knobs_of(arch, shape)), tmp_path)
    # PEFT's own rewriting of it is read as well.
    load_in_peft(arch, tmp_path).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    rewritten = load_adapter(tmp_path / "peft")
    assert {n: t.tolist() for n, t in rewritten.tensors.items()} == {n: t.tolist() for n, t in adapter.tensors.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pefts_here(arch: str, shape: str, tmp_path: Path) -> None:
    knobs = knobs_of(arch, shape)
    attention, mlp, _ = NAMES[arch]
    knobs["target_modules"] = [mlp] if knobs.get("target_modules") == "mlp" else [attention, mlp]
    model = peft.get_peft_model(tiny_model(arch), peft.LoraConfig(task_type="CAUSAL_LM", **knobs))
    state = randomize(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    peft.set_peft_model_state_dict(model, state)
    model.eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    adapter = load_adapter(tmp_path)
    bank = inject_lora(tiny_model(arch), adapter.config)
    bank.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(bank), logits(model))
    assert adapter.metadata == {}


def test_names_that_match_nothing_are_left_aside_as_peft_does(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "c_attn"], r=4)
    model = peft.get_peft_model(tiny_model("llama"), config)
    state = randomize(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    peft.set_peft_model_state_dict(model, state)
    model.eval().save_pretrained(tmp_path, save_embedding_layers=False)

    adapter, base = load_adapter(tmp_path), tiny_model("llama")
    bank = inject_lora(base, without_absent(base, adapter.config))
    bank.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(bank), logits(model))
    assert {path.rpartition(".")[2] for path in bank.layers} == {"q_proj"}
    gpt_neox = tiny_model("gpt_neox")
    with pytest.raises(ConfigError, match="'q_proj' matches no linear layer"):
        inject_lora(gpt_neox, without_absent(gpt_neox, adapter.config))


@pytest.mark.parametrize(
    "names",
    [["norm"], ["embed_tokens", "norm"], ["input_layernorm", "lm_head"], ["model.norm", "norm"]],
)
def test_saved_modules_cross_over_under_short_names(names: list[str], tmp_path: Path) -> None:
    """PEFT takes every module whose path ends in the letters of a name, lorafleet only whole parts of a path."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": names}
    config = LoraConfig(**fields)
    bank = filled_bank("llama", config)
    save(bank, config, tmp_path / "ours")
    assert_close(logits(load_in_peft("llama", tmp_path / "ours")), bank_logits(bank))

    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    state = randomize(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    peft.set_peft_model_state_dict(model, state)
    model.eval().save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    adapter = load_adapter(tmp_path / "pefts")
    bank = inject_lora(tiny_model("llama"), adapter.config)
    bank.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(bank), logits(model))


def test_peft_config_holds_only_what_every_release_knows(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2})
    save(filled_bank("llama", config), config, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert set(fields) <= known
    assert fields["lora_alpha"] == 8
    assert isinstance(fields["lora_alpha"], int)
    assert fields["peft_type"] == "LORA"
    assert "model.layers.0.self_attn.q_proj" in fields["target_modules"]


def test_order_of_overlapping_patterns_survives(tmp_path: Path) -> None:
    config = LoraConfig(r=4, rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 3})
    bank = filled_bank("llama", config)
    save(bank, config, tmp_path)
    assert list(load_adapter(tmp_path).config.rank_pattern) == ["layers.0.self_attn.q_proj", "q_proj"]
    assert_close(logits(load_in_peft("llama", tmp_path)), bank_logits(bank))


@pytest.mark.parametrize("scale", ["regex", "suffix list", "first layer", "layers pattern", "unused pattern"])
def test_pefts_selections(scale: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "regex": {"target_modules": r".*layers\.1\.(self_attn\.q_proj|mlp\.\w+_proj)"},
        "suffix list": {"target_modules": ["self_attn.v_proj", "up_proj"]},
        "first layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
        "layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        "unused pattern": {
            "target_modules": ["q_proj"],
            "rank_pattern": {"nowhere": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    }[scale]
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
    peft.set_peft_model_state_dict(model, randomize(peft.get_peft_model_state_dict(model, save_embedding_layers=False)))
    model.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = load_adapter(tmp_path)
    bank = inject_lora(tiny_model("llama"), adapter.config)
    bank.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(bank), logits(model))
