"""Can PEFT, vLLM and llama.cpp serve an adapter as it is? Asked when training starts, not after it."""

import math
from collections.abc import Sequence

from lorafleet.config.lora import LoraConfig
from lorafleet.files.adapter_tensors import rank_and_alpha

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` can be; an adapter's rank may be anything up to it."""


_ENDS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "lm_head", "embed_out")
"""Embeddings and output heads, by the names of their modules."""


def deployability(config: LoraConfig, target_paths: Sequence[str]) -> dict[str, list[str]]:
    """Say which runtimes can serve an adapter of this shape, and if not, why and what would help.

    Args:
        config: The adapter's config.
        target_paths: The modules it adapts.

    Returns:
        For ``peft``, ``vllm`` and ``llama.cpp`` the reasons against it, some of which hold for some bases only and say
        which; an empty list means that it can.
    """
    config = config.as_plain()
    return {"peft": [], "vllm": _vllm(config, target_paths), "llama.cpp": _llama_cpp(config, target_paths)}


def vllm_rank_flag(config: LoraConfig, target_paths: Sequence[str]) -> int | None:
    """The smallest ``--max-lora-rank`` with which vLLM takes the adapter; none where its rank is too high."""
    config = config.as_plain()
    rank = max((rank_and_alpha(config, path)[0] for path in target_paths), default=config.r)
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def _vllm(config: LoraConfig, paths: Sequence[str]) -> list[str]:
    reasons = []
    if vllm_rank_flag(config, paths) is None:
        rank = max(rank_and_alpha(config, path)[0] for path in paths) if paths else config.r
        reasons.append(f"its rank {rank} is above {VLLM_RANKS[-1]}, the most that vLLM takes")
    if config.use_dora:
        reasons.append("vLLM has no DoRA; merge it instead")
    if config.modules_to_save:
        reasons.append(f"it saves whole modules ({', '.join(config.modules_to_save)}); merge it instead")
    if config.bias != "none":
        reasons.append(f"it trains biases (bias: {config.bias}); merge it instead")
    one = config.scaling(config.r, config.lora_alpha)
    wrong = [path for path in paths if not math.isclose(_scale(config, path), one)]
    if wrong:
        reasons.append(
            f"vLLM scales every module by {one:g} and ignores rank_pattern and alpha_pattern, "
            f"which is wrong for {_some(wrong)}; merge it, or export it with the scale baked in"
        )
    if ends := _ends(paths):
        reasons.append(f"vLLM refuses an adapter of {ends} for models that do not list it; merge it instead")
    return reasons


def _llama_cpp(config: LoraConfig, paths: Sequence[str]) -> list[str]:
    reasons = []
    if config.use_dora:
        reasons.append("GGUF adapters hold A and B only, not DoRA's magnitudes; merge it instead")
    if config.modules_to_save:
        reasons.append(f"GGUF adapters hold A and B only, not {', '.join(config.modules_to_save)}; merge it instead")
    if config.bias != "none":
        reasons.append(f"GGUF adapters hold A and B only, not biases (bias: {config.bias}); merge it instead")
    if ends := _ends(paths):
        reasons.append(f"llama.cpp cannot adapt {ends} where the base has one matrix for both ends; merge it instead")
    ranks = {path: rank_and_alpha(config, path)[0] for path in paths}
    wrong = [path for path in paths if not math.isclose(_scale(config, path), config.lora_alpha / ranks[path])]
    if wrong:
        cause = "rsLoRA" if config.use_rslora else "alpha_pattern"
        reasons.append(
            f"llama.cpp scales by lora_alpha / rank and knows no {cause}, which is wrong for {_some(wrong)}; "
            "merge it, or export it with the scale baked in"
        )
    return reasons


def _ends(paths: Sequence[str]) -> str:
    return ", ".join(path for path in paths if path.rpartition(".")[2] in _ENDS)


def _scale(config: LoraConfig, path: str) -> float:
    return config.scaling(*rank_and_alpha(config, path))


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} modules such as {paths[0]}"
