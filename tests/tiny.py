"""Tiny random models and a tiny tokenizer for tests, made in milliseconds."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "mistral", "phi", "gpt2", "opt", "gpt_neox")
VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LINES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant: you are a helpful assistant.",
    "positive negative neutral; the movie was great, the movie was bad.",
    "one two three four five six seven eight nine ten 0123456789",
    "今天天气很好，我们去公园散步吧。",
)


def tiny_config(arch: str, **overrides: Any) -> PreTrainedConfig:
    """A config of ``arch`` with 2 layers and hidden size 32; ``overrides`` replace any of its fields."""
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    if arch == "gpt2":
        shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    elif arch == "opt":
        shape = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
    else:
        shape = {"intermediate_size": 64, "max_position_embeddings": 512}
    if arch != "gpt2":
        shape |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if arch in ("llama", "qwen2", "qwen3", "gemma", "mistral"):
        shape |= {"num_key_value_heads": 2}
    if arch in ("qwen3", "gemma"):
        shape |= {"head_dim": 8}
    return AutoConfig.for_model(arch, vocab_size=VOCAB_SIZE, **(ids | shape | overrides))


def tiny_model(arch: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of ``arch`` in ``eval()``; its biases and norms are random too.

    The global random state is left as it was. Fresh models have zero biases, which would hide a bias that is lost.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                else:
                    parameter.mul_(4)  # std 0.02 at hidden size 32 leaves nearly uniform outputs
    return model.to(dtype).eval()


@cache
def _tiny_vocabulary() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's special tokens; eos is ``<|im_end|>``, pad is ``<|endoftext|>``."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tiny_vocabulary()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML if chat_template else None,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tiny_base_folder(path: Path | str, arch: str = "llama", *, chat_template: bool = True, **overrides: Any) -> Path:
    """Save a tiny model and tokenizer in ``path`` as a Hugging Face folder; returns the path."""
    path = Path(path)
    tiny_model(arch, **overrides).save_pretrained(path)
    tiny_tokenizer(chat_template).save_pretrained(path)
    return path
