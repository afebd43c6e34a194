"""Bases from folders: frozen, hashed, complete; everything else is refused by name."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafleet.config import ModelConfig
from lorafleet.errors import ConfigError, ModelError
from lorafleet.models.load import load_base, load_meta_model, load_tokenizer
from tests.tiny import ARCHITECTURES, tiny_base_folder, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 5, 9, 100]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_base_folder(tmp_path / "base", "llama")


def config(path: object, **knobs: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(path), **{"device": "cpu", **knobs})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_base_is_frozen_and_complete(arch: str, tmp_path: Path) -> None:
    base = load_base(config(tiny_base_folder(tmp_path / "base", arch)))
    assert base.name == base.source == str(tmp_path / "base")
    assert base.revision is None
    assert base.dtype == torch.float32
    assert base.device == torch.device("cpu")
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, tiny_model(arch)(IDS).logits)
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert len(base.weights_hash) == len(base.tokenizer_hash) == 64


def test_dtype_and_hash(folder: Path) -> None:
    first = load_base(config(folder))
    half = load_base(config(folder, dtype="bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.weights_hash == first.weights_hash
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-7
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed = load_base(config(folder))
    assert changed.weights_hash != first.weights_hash
    assert changed.tokenizer_hash == first.tokenizer_hash


def test_sharded_weights(folder: Path) -> None:
    base = load_base(config(folder))
    base.model.save_pretrained(folder / "sharded", max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(folder / "sharded")
    sharded = load_base(config(folder / "sharded"))
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    assert sharded.weights_hash != base.weights_hash
    assert torch.equal(sharded.model(IDS).logits, base.model(IDS).logits)


def test_the_end_of_text_stands_in_for_a_missing_pad_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(config(folder)).pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="no end-of-text token"):
        load_tokenizer(config(folder))


def test_the_tokenizers_files_are_those_that_transformers_saves(folder: Path, tmp_path: Path) -> None:
    base = load_base(config(folder))
    base.tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}  # the second in a folder
    base.tokenizer.save_pretrained(tmp_path / "saved")
    saved = {str(path.relative_to(tmp_path / "saved")): path for path in (tmp_path / "saved").rglob("*.*")}
    assert base.tokenizer_files == {name: path.read_bytes() for name, path in saved.items()}
    assert {"tokenizer.json", "additional_chat_templates/tools.jinja"} <= base.tokenizer_files.keys()


def test_a_meta_model_needs_the_config_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    model = load_meta_model(config(folder))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == 51360


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = load_meta_model(config(tiny_base_folder(tmp_path / "base", "gpt2")))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_model("gpt2").parameters())


def test_names_that_are_no_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_name_or_path is missing"):
        load_base(ModelConfig())
    with pytest.raises(ModelError, match="path does not exist; did you mean 'base'"):
        load_base(config(tmp_path / "bsae"))
    with pytest.raises(ModelError, match="path does not exist"):
        load_base(config("a/b/c"))
    with pytest.raises(ModelError, match=r"is a file; a base is a folder"):
        load_base(config(folder / "config.json"))
    with pytest.raises(ModelError, match="called 'smolm2-135m'; did you mean 'smollm2-135m'"):
        load_base(config("smolm2-135m"))
    with pytest.raises(ConfigError, match="revision = 'v2' is for hub models"):
        load_base(config(folder, revision="v2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config.json; it holds nothing"):
        load_base(config(tmp_path / "empty"))
    (tmp_path / "empty" / "x.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"name the file, for example .*x\.gguf"):
        load_base(config(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match=r"holds an adapter, not a base model \(its base is 'org/base'\)"):
        load_base(config(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"its adapter_config.json is damaged"):
        load_base(config(tmp_path / "empty"))


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot load org/unknown-model"):
        load_base(config("org/unknown-model"))


def test_weights_that_are_missing_or_damaged(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layers.1.self_attn" not in n and n != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"(?s)incomplete: 5 faults.*lm_head.*layers.1.self_attn.k_proj"):
        load_base(config(folder))
    wrong = tensors | {"model.norm.weight": torch.ones(7)}
    save_file(wrong, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot load"):
        load_base(config(folder))
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="cannot load"):
        load_base(config(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_base(config(folder))


def test_pickled_weights_are_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model.bin\).*save_pretrained"):
        load_base(config(folder))


def test_an_adapter_beside_a_model_is_not_applied_silently(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        load_base(config(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model_type": "nonsense"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_damaged_configs(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot load"):
        load_base(config(folder))
    with pytest.raises(ModelError, match="cannot load"):
        load_meta_model(config(folder))


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load_tokenizer(config(folder))


def test_code_in_a_models_folder_runs_only_when_trusted(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="allow it with --trust-remote-code"):
        load_base(config(folder))
    with pytest.raises(ModelError, match="allow it with --trust-remote-code"):
        load_meta_model(config(folder))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_larger_than_the_model(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="the tokenizer knows 552 tokens, the model only 512"):
        load_base(config(folder))


def test_no_progress_bars_of_others(folder: Path) -> None:
    script = (
        "import sys; from lorafleet.config import ModelConfig; from lorafleet.models.load import load_base\n"
        "load_base(ModelConfig(model_name_or_path=sys.argv[1], device='cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "Loading weights" not in done.stderr


def test_a_moved_base_has_the_same_hash(folder: Path, tmp_path: Path) -> None:
    first = load_base(config(folder)).weights_hash
    shutil.move(folder, tmp_path / "moved")
    assert load_base(config(tmp_path / "moved")).weights_hash == first
