"""Counts agree with what injection really trains; a 70B is inspected from its config alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafleet
from lorafleet.config import LoraConfig
from lorafleet.errors import AdapterError, ConfigError, ModelError
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import inject_lora
from tests.tiny import ARCHITECTURES, tiny_base_folder, tiny_model

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"r": 3, "target_modules": "mlp", "rank_pattern": {".*0.*": 5}},
        {"bias": "all", "layers_to_transform": [1]},
        {"bias": "lora_only", "target_modules": "attention"},
    ],
    ids=["default", "rank pattern", "bias all", "bias lora_only"],
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_counts_are_what_injection_trains(arch: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_base_folder(tmp_path, arch)
    total = sum(p.numel() for p in tiny_model(arch).parameters())
    found = lorafleet.inspect(folder, **knobs)
    bank = inject_lora(tiny_model(arch), LoraConfig(**knobs))
    trained = sum(t.numel() for t in bank.state_dict(0).values())
    assert found.kind == "model"
    assert found.total_parameters == total
    assert found.trainable_parameters == trained
    assert found.reduction_ratio == total / trained
    assert found.adapter_bytes == 4 * trained
    assert found.base_bytes == (tmp_path / "model.safetensors").stat().st_size
    adapted = [group for group in found.groups if group.r is not None]
    assert sum(group.count for group in adapted) == len(bank.layers)
    assert sum(group.adapter_parameters for group in found.groups) == found.adapter_parameters
    json.dumps(found.as_dict())


def test_saved_modules_count_whole(tmp_path: Path) -> None:
    folder = tiny_base_folder(tmp_path, "llama")
    found = lorafleet.inspect(folder, modules_to_save=["lm_head"], target_modules=["q_proj"], r=2)
    assert found.trainable_parameters - found.adapter_parameters == 512 * 32
    assert found.adapter_parameters == 2 * 2 * (32 + 32)
    assert "whole modules" in found.deployability["vllm"][0]


def test_an_adapter(tmp_path: Path) -> None:
    base = tiny_base_folder(tmp_path / "base", "llama")
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "down_proj"])
    bank = inject_lora(tiny_model("llama"), config)
    save_adapter(tmp_path / "run", config, bank.state_dict(0), base_name=str(base), metadata={"steps": 3})
    found = lorafleet.inspect(tmp_path / "run")
    total = sum(p.numel() for p in tiny_model("llama").parameters())
    assert found.kind == "adapter"
    assert found.base == str(base)
    assert found.architecture == "LlamaForCausalLM"
    assert found.total_parameters == total
    assert found.adapter_parameters == found.trainable_parameters == 2 * (2 * 64 + 4 * 96)
    assert found.adapter_bytes == (tmp_path / "run" / "adapter_model.safetensors").stat().st_size
    assert found.metadata == {"steps": 3}
    assert [(g.name, g.count, g.in_features, g.out_features, g.r, g.scale) for g in found.groups] == [
        ("model.layers.*.mlp.down_proj", 2, 64, 32, 4, 2.0),
        ("model.layers.*.self_attn.q_proj", 2, 32, 32, 2, 4.0),
    ]
    assert found.scales == [
        {"r": 4, "lora_alpha": 8.0, "scale": 2.0, "modules": 2},
        {"r": 2, "lora_alpha": 8.0, "scale": 4.0, "modules": 2},
    ]
    assert found.vllm_max_lora_rank == 8
    assert "ignores rank_pattern" in found.deployability["vllm"][0]
    assert json.loads(json.dumps(found.as_dict()))["scales"] == found.scales


def test_an_adapter_whose_base_is_elsewhere(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    bank = inject_lora(tiny_model("llama"), config)
    save_adapter(tmp_path / "run", config, bank.state_dict(0), base_name="org/unreachable", metadata={})
    found = lorafleet.inspect(str(tmp_path / "run"))
    assert found.base == "org/unreachable"
    assert found.total_parameters is None
    assert found.reduction_ratio is None
    base = tiny_base_folder(tmp_path / "base", "llama")
    assert lorafleet.inspect(tmp_path / "run", model=str(base)).total_parameters == 51360
    with pytest.raises(ConfigError, match=r"has its own r;"):
        lorafleet.inspect(tmp_path / "run", r=4)
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="SHA-256"):
        lorafleet.inspect(tmp_path / "run")


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the path does not exist"):
        lorafleet.inspect("./nowhere")
    with pytest.raises(ModelError, match=r"has no config.json"):
        lorafleet.inspect(tmp_path)
    folder = tiny_base_folder(tmp_path, "llama")
    with pytest.raises(ConfigError, match="'q_porj' matches no linear layer"):
        lorafleet.inspect(folder, target_modules=["q_porj"])
    with pytest.raises(ConfigError, match="unknown key 'rang'"):
        lorafleet.inspect(folder, rang=3)
    with pytest.raises(ConfigError, match="two models are named"):
        lorafleet.inspect(folder, model="other")


def test_a_70b_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B))
    script = (
        "import sys, json, torch, lorafleet; from lorafleet.models.machine import peak_memory_bytes\n"
        "found = lorafleet.inspect(sys.argv[1], r=16)\n"
        "heavy = [m for m in ('peft', 'datasets', 'sklearn', 'trl') if m in sys.modules]\n"
        "print(json.dumps([found.as_dict(), peak_memory_bytes(torch.device('cpu')), heavy]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    found, peak, heavy = json.loads(done.stdout)
    assert found["total_parameters"] == 70_553_706_496
    assert found["adapter_parameters"] == 80 * 16 * ((8192 + 8192) * 2 + (8192 + 1024) * 2 + (8192 + 28672) * 3)
    assert found["base_bytes"] == 2 * 70_553_706_496
    assert found["reduction_ratio"] == pytest.approx(340.7, abs=0.1)
    assert found["deployability"] == {"peft": [], "vllm": [], "llama.cpp": []}
    assert {g["name"]: g["count"] for g in found["groups"]}["lm_head"] == 1
    assert peak < 1 << 30
    assert heavy == []


def test_inspecting_leaves_the_default_device_alone(tmp_path: Path) -> None:
    lorafleet.inspect(tiny_base_folder(tmp_path, "llama"))
    assert torch.empty(1).device.type == "cpu"
