"""A pickled adapter becomes the same adapter as safetensors; what would run code is refused and does not run."""

import json
import os
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


def peft_model(folder: Path, **options: Any) -> nn.Module:
    """A PEFT model with random adapter weights, and its files in ``folder``."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model("llama"), LoraConfig(**settings | options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


WHOLE_HEAD = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("form", "options"),
    [("whole model", {}), ("nested", {"use_dora": True}), ("whole model", WHOLE_HEAD), ("adapter only", WHOLE_HEAD)],
    ids=str,
)
def test_the_same_adapter(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    model = peft_model(tmp_path, **options)
    state = get_peft_model_state_dict(model) if form == "adapter only" else model.state_dict()
    torch.save({"epoch": 3, "state_dict": state} if form == "nested" else state, tmp_path / "adapter.pth")
    done = convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"), base="tiny")
    mine, wanted = load_adapter(tmp_path / "out"), load_adapter(tmp_path)
    kept = {name: tensor for name, tensor in wanted.tensors.items() if ".base_layer." not in name}
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


def config_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    config_beside(tmp_path)
    torch.save({"x.lora_A.weight": Evil(tmp_path / "evil")}, tmp_path / "adapter.pth")
    with pytest.raises(AdapterError, match="is refused, nothing of it was run"):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists()


def one() -> Tensor:
    return torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "no mapping of names to tensors"),
        ({"weight": one()}, "has no tensors of LoRA; it has weight"),
        ({"m.q_proj.lora_A.a.weight": one(), "m.q_proj.lora_A.b.weight": one()}, r"holds 2 adapters \(a, b\)"),
        ({"m.q_proj.lora_A.weight": one()}, "lora_B"),
    ],
    ids=["numbers", "another model", "two adapters", "half an adapter"],
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


def test_a_damaged_file(tmp_path: Path) -> None:
    config_beside(tmp_path)
    (tmp_path / "adapter.pth").write_bytes(b"\x80\x02garbage")
    with pytest.raises(AdapterError, match="is refused, nothing of it was run"):
        convert(str(tmp_path / "adapter.pth"), output_dir=str(tmp_path / "out"))
