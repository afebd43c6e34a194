"""What vLLM and llama.cpp would refuse, or scale wrongly, is said before training."""

from typing import Any

import pytest

from lorafleet.config import LoraConfig
from lorafleet.files.deployability import deployability, vllm_rank_flag

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


def reasons(**knobs: Any) -> dict[str, str]:
    found = deployability(LoraConfig(**{"r": 8, "lora_alpha": 16, **knobs}), PATHS)
    assert list(found) == ["peft", "vllm", "llama.cpp"]
    return {runtime: "; ".join(why) for runtime, why in found.items()}


def test_a_plain_adapter_runs_everywhere() -> None:
    assert reasons() == {"peft": "", "vllm": "", "llama.cpp": ""}
    assert reasons(r=12)["vllm"] == ""


@pytest.mark.parametrize(
    ("knobs", "vllm", "llama"),
    [
        ({"use_rslora": True}, "", "knows no rsLoRA"),
        ({"alpha_pattern": {"q_proj": 4}}, "ignores rank_pattern and alpha_pattern", "knows no alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, "ignores rank_pattern and alpha_pattern", ""),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}, "", "knows no alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "whole modules (lm_head)", "A and B only, not lm_head"),
        ({"bias": "all"}, "biases (bias: all)", "not biases (bias: all)"),
        ({"r": 513}, "rank 513 is above 512", ""),
        ({"use_dora": True}, "has no DoRA", "not DoRA's magnitudes"),
        ({"r": 257, "init_lora_weights": "pissa"}, "rank 514 is above 512", ""),
        ({"rank_pattern": {"q_proj": 600}, "alpha_pattern": {"q_proj": 1200}}, "rank 600", "knows no alpha_pattern"),
    ],
)
def test_reasons(knobs: dict[str, Any], vllm: str, llama: str) -> None:
    found = reasons(**knobs)
    assert found["peft"] == ""
    assert (vllm in found["vllm"]) if vllm else found["vllm"] == ""
    assert (llama in found["llama.cpp"]) if llama else found["llama.cpp"] == ""


def test_only_modules_that_are_adapted_count() -> None:
    config = LoraConfig(alpha_pattern={"lm_head": 1})
    assert deployability(config, PATHS)["vllm"] == []


def test_the_rank_flag_for_vllm() -> None:
    assert vllm_rank_flag(LoraConfig(r=4), PATHS) == 8
    assert vllm_rank_flag(LoraConfig(r=8, rank_pattern={"q_proj": 17}), PATHS) == 32
    assert vllm_rank_flag(LoraConfig(r=1000), PATHS) is None
