"""GGUF files give the model and tokenizer that went into them; damaged ones are refused."""

import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lorafleet.config import LoraConfig, ModelConfig
from lorafleet.errors import MissingExtraError, ModelError
from lorafleet.lora import inject_lora
from lorafleet.models.gguf import convert_gguf, load_gguf_tokenizer
from lorafleet.models.load import load_base, load_meta_model, load_tokenizer
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 5, 9, 100, 300]])
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of a rotary projection's rows."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_llama(path: Path, quantized: bool = False, pre: str = "default") -> Path:
    """Write ``tiny_model("llama")`` and the tiny tokenizer as llama.cpp's converter would."""
    model, writer = tiny_model("llama"), gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, pre, config.vocab_size)
    for name, tensor in model.state_dict().items():
        writer_name = gguf_name(name)
        if "attn_q" in writer_name or "attn_k" in writer_name:
            heads = config.num_attention_heads if "attn_q" in writer_name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        if quantized and tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(writer_name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(writer_name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, pre: str, size: int) -> None:
    rules = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(rules["model"]["vocab"].items(), key=lambda item: item[1])]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    special = {token["content"] for token in rules["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed or name == "lm_head.weight":
        return fixed.get(name, "output.weight")
    _, _, block, *place, kind = name.split(".")
    return f"blk.{block}.{NAMES['.'.join(place)]}.{kind}"


def test_a_gguf_file_is_a_base_like_any_other(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf")
    base = load_base(ModelConfig(model_name_or_path=str(path), device="cpu"))
    assert base.name == base.source == str(path)
    assert torch.equal(base.model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert not any(p.requires_grad for p in base.model.parameters())
    text = "The quick brown fox, 今天天气 <|im_end|>"
    assert base.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert base.tokenizer.chat_template == CHATML
    assert (base.tokenizer.eos_token, base.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert load_tokenizer(ModelConfig(model_name_or_path=str(path))).eos_token_id == 2
    meta = load_meta_model(ModelConfig(model_name_or_path=str(path)))
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in base.model.parameters())
    inject_lora(base.model, LoraConfig())


def test_its_special_tokens_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = AutoTokenizer.from_pretrained

    def as_transformers_5_17(*args: Any, **kwargs: Any) -> Any:
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", as_transformers_5_17)
    tokenizer = load_gguf_tokenizer(write_llama(tmp_path / "tiny.gguf"))
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def test_quantized_weights_are_unpacked_and_can_be_saved(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", quantized=True)
    base = load_base(ModelConfig(model_name_or_path=str(path), device="cpu", dtype="float32"))
    wanted, found = tiny_model("llama")(IDS).logits, base.model(IDS).logits
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_base(ModelConfig(model_name_or_path=str(tmp_path / "saved"), device="cpu"))
    assert torch.equal(again.model(IDS).logits, found)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_conversion_to_a_folder(tmp_path: Path) -> None:
    convert_gguf(write_llama(tmp_path / "tiny.gguf"), tmp_path / "folder")
    base = load_base(ModelConfig(model_name_or_path=str(tmp_path / "folder"), device="cpu"))
    assert torch.equal(base.model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert base.tokenizer.chat_template == CHATML
    assert base.tokenizer.model_max_length == 512
    assert not list((tmp_path / "folder").glob("*.gguf"))


def test_digits_are_cut_as_the_file_says(tmp_path: Path) -> None:
    plain = load_gguf_tokenizer(write_llama(tmp_path / "plain.gguf"))
    digits = load_gguf_tokenizer(write_llama(tmp_path / "digits.gguf", pre="smollm"))
    words = [token for token, _ in digits.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1234")]
    assert words == ["in", "ĠĠ", "1", "2", "3", "4"]
    words = [token for token, _ in plain.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1234")]
    assert words == ["in", "Ġ", "Ġ1234"]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "no GGUF file"),
        (b"GGUF", "no GGUF file"),
        (b"PK\x03\x04" + bytes(60), "no GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(60), "GGUF version 1"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 60, "is damaged"),
        (b"GGUF" + (3).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little") + bytes(60), "promises 1099511627776"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(60), r"cannot (read the GGUF file|load)"),
    ],
)
def test_what_is_no_gguf_file(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    for load in (load_base, load_meta_model, load_tokenizer):
        with pytest.raises(ModelError, match=message):
            load(ModelConfig(model_name_or_path=str(path)))


def test_truncated_and_garbled_files_are_refused_fast(tmp_path: Path) -> None:
    data = write_llama(tmp_path / "tiny.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in (30, 200, 2000, len(data) // 2, len(data) - 100):
        bad.write_bytes(data[:length])
        started = time.perf_counter()
        with pytest.raises(ModelError):
            load_base(ModelConfig(model_name_or_path=str(bad)))
        assert time.perf_counter() - started < 5
    lengths = bytearray(data)
    lengths[24:32] = b"\xff" * 8  # the first key's length
    bad.write_bytes(lengths)
    with pytest.raises(ModelError):
        load_base(ModelConfig(model_name_or_path=str(bad)))


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_llama(tmp_path / "tiny.gguf")
    monkeypatch.setattr("lorafleet.models.gguf.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorafleet\[demo\]'"):
        load_base(ModelConfig(model_name_or_path=str(path)))
