"""Combined adapters answer as PEFT's own combination of the same files."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafleet.cli.main import main
from lorafleet.config import AdapterConfig, ModelConfig
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.generation.adapted import load_adapted
from lorafleet.lora import Routing
from lorafleet.methods.combine import combine
from lorafleet.models.load import load_base
from tests.serving.fleet import TinyFleet, write_adapter

IDS = torch.tensor([[5, 9, 7, 11, 200, 100]])
SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> TinyFleet:
    return TinyFleet(tmp_path_factory.mktemp("fleet"), 0)


def logits(fleet: TinyFleet, folder: Path) -> torch.Tensor:
    adapted = load_adapted(ModelConfig(device="cpu"), AdapterConfig(adapter=str(folder)))
    assert adapted.bank is not None
    with torch.no_grad(), adapted.bank.route(Routing((0,), (IDS.numel(),))):
        found: torch.Tensor = adapted.base.model(input_ids=IDS).logits
    return found


def pefts(fleet: TinyFleet, folders: list[Path], weights: list[float], how: str, **options: Any) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(fleet.base_folder, dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    torch.manual_seed(42)
    model.add_weighted_adapter([str(i) for i in range(len(folders))], weights, "all", how, **options)
    model.set_adapter("all")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("how", ["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", *SVD])
def test_each_combination_is_pefts(fleet: TinyFleet, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how.startswith("dare"):  # what is dropped depends on the order of layers, which is the base's only in PEFT
        monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.arange(p.numel()) % 5 < 2).to(p.dtype).view(p.shape))
    targets = [["q_proj", "down_proj"], ["q_proj", "v_proj"]]
    folders = [
        write_adapter(fleet.base, tmp_path / str(i), i, r=4, lora_alpha=8.0 + i, target_modules=targets[i])
        for i in range(2)
    ]
    options: dict[str, Any] = {} if how in ("linear", "cat", "svd") else {"density": 0.4}
    rank = {"svd_rank": 3} if how in SVD else {}
    knobs = options | ({"rank": 3} if how in SVD else {})
    result = combine(
        [str(f) for f in folders], weights=[0.7, 0.4], combination=how, output_dir=str(tmp_path / "c"), **knobs
    )
    assert result.r == {"cat": 8}.get(how, 3 if how in SVD else 4)
    wanted = pefts(fleet, folders, [0.7, 0.4], how, **options, **rank)
    found = logits(fleet, tmp_path / "c")
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    if how == "cat":  # the sum itself
        base = AutoModelForCausalLM.from_pretrained(fleet.base_folder, dtype=torch.float32).eval()
        assert (found - base(input_ids=IDS).logits).abs().max() > 1e-2


def test_rslora_keeps_its_scale(fleet: TinyFleet, tmp_path: Path) -> None:
    plain = write_adapter(fleet.base, tmp_path / "plain", 1, r=4, lora_alpha=16.0)
    same = write_adapter(fleet.base, tmp_path / "same", 1, r=4, lora_alpha=8.0, use_rslora=True)
    other = write_adapter(fleet.base, tmp_path / "other", 2, r=2)
    for name, first in (("a", plain), ("b", same)):
        combine([str(first), str(other)], output_dir=str(tmp_path / name))
    assert torch.allclose(logits(fleet, tmp_path / "a"), logits(fleet, tmp_path / "b"), atol=1e-5)


def test_from_the_command_line_by_name(fleet: TinyFleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.add("x", 1)
    fleet.add("y", 4)
    command = ["adapters", "combine", "x", "y@prod", "--registry", fleet.registry.location]
    assert main([*command, "--output-dir", str(tmp_path / "c"), "--weights", "1,-0.5"]) == 0
    assert "1 · x + -0.5 · y@prod by cat, rank 6" in capsys.readouterr().out
    assert main([*command, "--output-dir", str(tmp_path / "d"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == {"x": 0.5, "y@prod": 0.5}
    assert main([*command, "--output-dir", str(tmp_path / "d")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_does_not_combine_is_named(fleet: TinyFleet, tmp_path: Path) -> None:
    one, two = (str(write_adapter(fleet.base, tmp_path / str(i), i, r=2 + i)) for i in range(2))
    dora = str(write_adapter(fleet.base, tmp_path / "dora", 1, use_dora=True))
    output = str(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"(?s)named twice: .*weights: 2 adapters need as many; got 3"):
        combine([one, one], weights=[1, 2, 3], output_dir=output)
    with pytest.raises(ConfigError, match="two adapters or more; got 1"):
        combine([one], output_dir=output)
    with pytest.raises(AdapterError, match="linear does not take these adapters: .*same r"):
        combine([one, two], combination="linear", output_dir=output)
    with pytest.raises(AdapterError, match="more than A and B"):
        combine([one, dora], output_dir=output)
    other = TinyFleet(tmp_path / "other", 0)
    config = other.base_folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"remark": 1,', 1))
    base = load_base(ModelConfig(model_name_or_path=str(other.base_folder), device="cpu"))
    foreign = str(write_adapter(base, tmp_path / "foreign", 3))
    with pytest.raises(AdapterError, match="another base_weights_hash"):
        combine([one, foreign], output_dir=output)
    assert not Path(output).exists()
