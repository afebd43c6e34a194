"""A pickled adapter becomes the same adapter as safetensors; what would run code is refused and does not run."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from lorafleet.errors import AdapterError, ConfigError
from lorafleet.files.adapter import load_adapter
from lorafleet.files.pickled import convert
from tests.tiny import tiny_model


def peft_model(folder: Path, *, arch: str = "llama", **options: Any) -> nn.Module:
    """A PEFT model with random adapter weights and biases, and its files in ``folder``."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(arch), LoraConfig(**settings | options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith(".bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


WHOLE_HEAD = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
ALL_BIASES = {"arch": "opt", "bias": "all", "target_modules": ["q_proj"], "modules_to_save": ["fc1"]}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("whole model", {}),
        ("nested", {"use_dora": True}),
        ("whole model", WHOLE_HEAD),
        ("adapter only", WHOLE_HEAD),
        ("whole model", {"arch": "qwen2", "bias": "lora_only"}),
        ("whole model", ALL_BIASES),
        ("adapter only", ALL_BIASES),
    ],
    ids=str,
)
def test_the_same_adapter(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    model = peft_model(tmp_path, **options)
    state = get_peft_model_state_dict(model) if form == "adapter only" else model.state_dict()
    torch.save({"epoch": 3, "state_dict": state} if form == "nested" else state, tmp_path / "adapter.pth")
    done = convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"), base="tiny")
    mine, wanted = load_adapter(tmp_path / "out"), load_adapter(tmp_path)
    kept = {name: tensor for name, tensor in wanted.tensors.items() if not name.endswith(".base_layer.weight")}
    assert mine.tensors.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in mine.tensors.items())
    named = {"target_modules", "modules_to_save"}  # a saved adapter names its modules by their whole paths
    assert mine.config.model_dump(exclude=named) == wanted.config.model_dump(exclude=named)
    assert (done.tensors, mine.base_name) == (len(kept), "tiny")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def config_beside(folder: Path, **more: Any) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    config_beside(tmp_path)
    torch.save({"x.lora_A.weight": Evil(tmp_path / "evil")}, tmp_path / "adapter.pth")
    with pytest.raises(AdapterError, match=r"nothing of it was run: it holds '\w+.mkdir'.*save_pretrained") as refused:
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists()


def one() -> Tensor:
    return torch.zeros(4, 8)


def small_adapter(name: str = "default") -> dict[str, Tensor]:
    return {f"m.q_proj.lora_A.{name}.weight": one(), f"m.q_proj.lora_B.{name}.weight": one().T}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "no mapping of names to tensors"),
        ({"args": argparse.Namespace()}, "holds 'argparse.Namespace'.*save_pretrained"),
        ({"weight": one()}, "has no tensors of LoRA; it has weight"),
        ({"m.q_proj.lora_A.a.weight": one(), "m.q_proj.lora_A.b.weight": one()}, r"holds 2 adapters \(a, b\)"),
        ({"m.q_proj.lora_A.weight": one()}, "lora_B"),
    ],
    ids=["numbers", "settings", "another model", "two adapters", "half an adapter"],
)
def test_what_is_no_adapter(tmp_path: Path, content: Any, message: str) -> None:
    config_beside(tmp_path)
    torch.save(content, tmp_path / "adapter.pth")
    with pytest.raises(AdapterError, match=message):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))


def test_wrong_files_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match=r"(?s)3 faults.*no file .*a.pth.*adapter_config.json.*is not empty"):
        convert(str(tmp_path / "a.pth"), output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(("content", "message"), [(b"\x80\x02garbage", "it is damaged"), (b"", "it is cut off")])
def test_a_damaged_file(tmp_path: Path, content: bytes, message: str) -> None:
    config_beside(tmp_path)
    (tmp_path / "adapter.pth").write_bytes(content)
    with pytest.raises(AdapterError, match=f"is refused, nothing of it was run: {message}"):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))


def test_modules_beside_the_file_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_beside(tmp_path)
    torch.save(small_adapter(), tmp_path / "adapter.pth")
    for name in ("pickle", "torch", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert convert("adapter.pth", output_dir="out").tensors == 2
    assert not (tmp_path / "evil").exists()


def test_the_reading_process_has_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_beside(tmp_path)
    torch.save(small_adapter(), tmp_path / "adapter.pth")
    seen = tmp_path / "environment"
    (tmp_path / "sitecustomize.py").write_text(f"import os; open({str(seen)!r}, 'w').write(' '.join(os.environ))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))
    assert "PATH" in seen.read_text().split() and "HF_TOKEN" not in seen.read_text()


def test_an_adapter_of_any_name(tmp_path: Path) -> None:
    config_beside(tmp_path, bias="all", modules_to_save=["lm_head"])
    more = {"m.lm_head.modules_to_save.my-adapter.weight": one(), "m.norm.bias": torch.zeros(8)}
    torch.save(small_adapter("my-adapter") | more, tmp_path / "adapter.pth")
    convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))
    names = {"q_proj.lora_A.weight", "q_proj.lora_B.weight", "lm_head.weight", "norm.bias"}
    assert load_adapter(tmp_path / "out").tensors.keys() == {f"base_model.model.m.{name}" for name in names}


def test_the_base_is_not_written(tmp_path: Path) -> None:
    """A sparse tensor cannot be: the conversion fails where the base is written too."""
    config_beside(tmp_path)
    torch.save(small_adapter() | {"m.base.weight": torch.eye(4).to_sparse()}, tmp_path / "adapter.pth")
    done = convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))
    assert (done.tensors, done.left_out) == (2, 1)


def test_a_small_file_of_large_tensors(tmp_path: Path) -> None:
    config_beside(tmp_path)
    torch.save({"m.q_proj.lora_A.weight": torch.zeros(1).expand(4096, 4096)}, tmp_path / "adapter.pth")
    with pytest.raises(AdapterError, match=r"would take 67108864 bytes, but the file has \d+;"):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))


def test_a_mapping_that_holds_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_beside(tmp_path)
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "adapter.pth")
    monkeypatch.setattr("lorafleet.files.pickled._LIMIT_SECONDS", 60)
    with pytest.raises(AdapterError, match="no mapping of names to tensors"):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))


def test_a_reading_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_beside(tmp_path)
    torch.save(small_adapter(), tmp_path / "adapter.pth")
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(AdapterError, match=r"ran out of memory or was killed \(signal 9\)"):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))


def test_a_refused_folder_names_the_command(tmp_path: Path) -> None:
    config_beside(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match=r"`lorafleet adapters convert .*adapter_model\.bin --output-dir"):
        load_adapter(tmp_path)
