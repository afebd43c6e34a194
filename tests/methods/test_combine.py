"""Combined adapters answer as PEFT's own combination of the same files."""

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafleet.cli.main import main
from lorafleet.config import AdapterConfig, ModelConfig
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.files.adapter import load_adapter, save_adapter
from lorafleet.files.manifest import MANIFEST
from lorafleet.files.run_folder import TEMPLATE
from lorafleet.generation.adapted import load_adapted
from lorafleet.lora import Routing
from lorafleet.methods.combine import combine
from lorafleet.models.load import Base, load_base
from tests.serving.fleet import TinyFleet, write_adapter
from tests.tiny import CHATML, tiny_base_folder

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
    with pytest.raises(ConfigError, match="two adapters or more; got 0"):
        combine([], output_dir=output)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file"):
        combine([one, two], output_dir=str(tmp_path / "file"))
    with pytest.raises(AdapterError, match=r"linear needs the same r in each layer: .*proj of .* has 3, that of .* 2;"):
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


@pytest.mark.parametrize("how", ["linear", "ties", "magnitude_prune"])
def test_a_layer_keeps_a_rank_of_its_own(fleet: TinyFleet, tmp_path: Path, how: str) -> None:
    ranks = {"r": 4, "rank_pattern": {"q_proj": 2}}
    folders = [write_adapter(fleet.base, tmp_path / str(i), i, **ranks) for i in range(2)]
    options = {} if how == "linear" else {"density": 0.5}
    names = [str(folder) for folder in folders]
    combine(names, weights=[0.7, 0.4], combination=how, output_dir=str(tmp_path / "c"), **options)
    wanted = pefts(fleet, folders, [0.7, 0.4], how, **options)
    assert (logits(fleet, tmp_path / "c") - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_layer_whose_ranks_differ_is_named(fleet: TinyFleet, tmp_path: Path) -> None:
    one = str(write_adapter(fleet.base, tmp_path / "one", 1, r=4))
    two = str(write_adapter(fleet.base, tmp_path / "two", 2, r=4, rank_pattern={"q_proj": 2}))
    for how in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(AdapterError, match=rf"{how} needs the same r .*0\.self_attn\.q_proj of .*two has 2, .* 4;"):
            combine([one, two], combination=how, output_dir=str(tmp_path / "c"))
    combine([one, two], output_dir=str(tmp_path / "c"))


def test_a_rank_above_a_layers_sides_loses_nothing(fleet: TinyFleet, tmp_path: Path) -> None:
    """Of k_proj 20 is above out alone, of up_proj 40 above in alone."""
    names = [str(write_adapter(fleet.base, tmp_path / str(i), i, r=3)) for i in range(2)]
    combine(names, output_dir=str(tmp_path / "cat"))
    wanted = logits(fleet, tmp_path / "cat")
    for rank in (20, 40):
        result = combine(names, combination="svd", rank=rank, output_dir=str(tmp_path / str(rank)))
        assert result.r == min(rank, 32)
        assert (logits(fleet, tmp_path / str(rank)) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_torchs_own_errors_are_ours(fleet: TinyFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise torch.linalg.LinAlgError("the algorithm did not converge")

    names = [str(write_adapter(fleet.base, tmp_path / str(i), i)) for i in range(2)]
    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(AdapterError, match="svd does not take these adapters: the algorithm did not converge"):
        combine(names, combination="svd", output_dir=str(tmp_path / "c"))


def test_an_output_head_in_pefts_own_files(fleet: TinyFleet, tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(2)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(fleet.base_folder, dtype=torch.float32)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        peft.get_peft_model(base, config).save_pretrained(folder)
        assert "base_model.model.lm_head.base_layer.weight" in load_adapter(folder).tensors
    combine([str(folder) for folder in folders], weights=[0.7, 0.4], output_dir=str(tmp_path / "c"))
    wanted = pefts(fleet, folders, [0.7, 0.4], "cat")
    assert (logits(fleet, tmp_path / "c") - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert all(".lora_" in name for name in load_adapter(tmp_path / "c").tensors)


def bare(base: Base, folder: Path, base_name: str) -> str:
    """An adapter without what lorafleet records, as PEFT writes it."""
    write_adapter(base, folder, 1)
    (folder / MANIFEST).unlink()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base_name}))
    return str(folder)


def test_other_bases_are_told_without_their_hashes(fleet: TinyFleet, tmp_path: Path) -> None:
    one = str(write_adapter(fleet.base, tmp_path / "one", 2))
    twin = bare(fleet.base, tmp_path / "twin", "another/base")
    with pytest.raises(AdapterError, match=r"twin has another base \(another/base\) than .*one .*adapter_config\.json"):
        combine([twin, one], output_dir=str(tmp_path / "c"))
    folder = tiny_base_folder(tmp_path / "base", intermediate_size=48)
    thin_base = load_base(ModelConfig(model_name_or_path=str(folder), device="cpu"))
    thin = bare(thin_base, tmp_path / "thin", "another/base")
    with pytest.raises(AdapterError, match=r"mlp\.down_proj of .*thin has \(in, out\) = \(48, 32\), .*\(64, 32\)"):
        combine([twin, thin], output_dir=str(tmp_path / "c"))
    third = str(write_adapter(thin_base, tmp_path / "third", 2))
    with pytest.raises(AdapterError, match=r"(?s)3 faults.* base_weights_hash.*another base \(.*not of one base"):
        combine([twin, one, third], output_dir=str(tmp_path / "c"))


def test_the_base_is_known_by_any_of_the_adapters(fleet: TinyFleet, tmp_path: Path) -> None:
    one = str(write_adapter(fleet.base, tmp_path / "one", 2))
    other_spelling = f"{fleet.base_folder}/../{fleet.base_folder.name}"
    nameless, twin = bare(fleet.base, tmp_path / "nameless", ""), bare(fleet.base, tmp_path / "twin", other_spelling)
    combine([nameless, twin, one], output_dir=str(tmp_path / "c"))
    found = load_adapter(tmp_path / "c")
    assert found.metadata["base_weights_hash"] == fleet.base.weights_hash and found.base_name == other_spelling


def asked(fleet: TinyFleet, folder: Path, prompt: str, template: str) -> str:
    """An adapter that was trained with a system prompt and a chat template."""
    one = load_adapter(write_adapter(fleet.base, folder, len(prompt)))
    metadata = one.metadata | {"data": {"data": "rows.jsonl", "system_prompt": prompt}}
    save_adapter(folder, one.config, one.tensors, base_name=fleet.base.name, metadata=metadata)
    (folder / TEMPLATE).write_text(template)
    return str(folder)


def test_it_is_asked_as_its_parts_are(fleet: TinyFleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = CHATML.replace("message['content']", "message['content'] + '!'")
    one, two = (asked(fleet, tmp_path / name, "Be brief.", template) for name in ("one", "two"))
    other = asked(fleet, tmp_path / "other", "Be kind.", CHATML)
    combine([one, two], output_dir=str(tmp_path / "c"))
    source = fleet.pool().source
    wanted, found = (
        source.profile(source.find(str(folder)), None).encoder.prompt_ids([{"role": "user", "content": "hello"}])
        for folder in (one, tmp_path / "c")
    )
    assert found == wanted and "Be brief.!" in source.base.tokenizer.decode(found)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        combine([one, two, other], output_dir=str(tmp_path / "d"))
    for what in ("system prompt", "chat template"):
        assert any(f"{other}: another {what} than that of {one}" in message for message in caplog.messages)
    assert "data" not in load_adapter(tmp_path / "d").metadata and not (tmp_path / "d" / TEMPLATE).exists()
