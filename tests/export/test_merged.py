"""A merged model answers as its adapter does, in transformers alone; a wrong one never stays."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lorafleet import merge
from lorafleet.config import AdapterConfig, ModelConfig
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.export import merged as merged_module
from lorafleet.generation.adapted import load_adapted
from lorafleet.lora import LoraLinear
from tests.generation.tiny_bank import saved_adapter
from tests.tiny import ARCHITECTURES

IDS = torch.arange(3, 43).view(2, 20) * 7


def difference(values: torch.Tensor, reference: torch.Tensor) -> float:
    return float((values - reference).abs().max() / reference.abs().max())


def unmerged_logits(folder: Path) -> torch.Tensor:
    adapted = load_adapted(ModelConfig(device="cpu"), AdapterConfig(adapter=str(folder)))
    return adapted.base.model(IDS).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"use_rslora": True, "bias": "all", "rank_pattern": {"0.+": 2}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
    ],
    ids=["plain", "rslora-bias-ranks", "saved-modules", "both-ends"],
)
def test_merged_equals_unmerged(arch: str, knobs: dict, tmp_path: Path) -> None:
    ends = {"gpt2": ["lm_head", "wte"], "gpt_neox": ["lm_head", "embed_in"]}
    knobs = {key: ends.get(arch, names) if "lm_head" in str(names) else names for key, names in knobs.items()}
    base, adapter = saved_adapter(tmp_path, arch, **knobs)
    result = merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"), device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert difference(merged(IDS).logits, unmerged_logits(adapter)) <= 1e-5
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits
        assert difference(merged(IDS).logits, plain) > 1e-2
    assert result.logits_difference <= result.tolerance
    assert result.tolerance == pytest.approx(1e-5 * max(1, result.adapter_effect))
    assert result.changed_tensors > 0
    assert result.unchanged_tensors > 0
    assert result.adapter_effect > 1e-2
    assert json.loads(json.dumps(result.as_dict()))["dtype"] == "float32"
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())


def test_folder_is_whole(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    result = merge(adapter=str(adapter), output_dir=str(tmp_path / "a" / "merged"))
    folder = Path(result.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert tokenizer("The quick fox").input_ids == AutoTokenizer.from_pretrained(base)("The quick fox").input_ids
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    assert result.bytes == sum(path.stat().st_size for path in folder.iterdir())
    record = json.loads((folder / merged_module.RECORD).read_text())
    assert len(record["changed_tensors"]) == result.changed_tensors == 14


@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("which", ["head target", "head saved", "embeddings saved"])
def test_tied_weights_are_untied(arch: str, which: str, tmp_path: Path) -> None:
    embeddings = "wte" if arch == "gpt2" else "embed_tokens"
    knobs = {
        "head target": {"target_modules": ["lm_head"]},
        "head saved": {"modules_to_save": ["lm_head"]},
        "embeddings saved": {"modules_to_save": [embeddings]},
    }[which]
    _, adapter = saved_adapter(tmp_path, arch, overrides={"tie_word_embeddings": True}, **knobs)
    result = merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))
    assert result.untied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not merged.config.tie_word_embeddings
    head, inputs = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert not torch.equal(head, inputs)
    with torch.no_grad():
        assert difference(merged(IDS).logits, unmerged_logits(adapter)) <= 1e-5


def test_tied_weights_stay_tied_when_untouched(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, overrides={"tie_word_embeddings": True})
    result = merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))
    assert not result.untied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_written_and_its_tolerance_stated(dtype: str, tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path)
    result = merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"), merge_dtype=dtype)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert 1e-5 < result.logits_difference <= result.tolerance
    assert result.dtype == dtype


def test_auto_keeps_the_precision_of_the_files(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    result = merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"), check_base=False)
    assert result.dtype == "bfloat16"


def test_base_files_are_not_touched(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    before = {path: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]}
    merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))
    assert {path: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]} == before


def test_faults_are_listed_together_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = saved_adapter(tmp_path)
    _, other = saved_adapter(tmp_path / "other", "gpt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(merged_module, "load_adapted", None)  # would fail if it were called
    monkeypatch.setattr(merged_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ConfigError) as error:
        merge(adapter=str(adapter), model=str(other.parent / "base"), output_dir=str(tmp_path / "full"))
    message = str(error.value)
    assert "holds something else than a merged model" in message
    assert "does not fit" in message
    assert "GB free" in message
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_output_dir_cannot_be_an_input(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    for folder in (base, adapter, tmp_path):
        with pytest.raises(ConfigError, match="holds the"):
            merge(adapter=str(adapter), output_dir=str(folder), overwrite=True)
    with pytest.raises(ConfigError, match="adapter is required"):
        merge(model=str(base), output_dir=str(tmp_path / "merged"))


def test_overwrite_replaces_a_merged_model_only_when_asked(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path)
    output = tmp_path / "merged"
    merge(adapter=str(adapter), output_dir=str(output))
    (output / "stale").write_text("x")
    with pytest.raises(ConfigError, match="overwrite"):
        merge(adapter=str(adapter), output_dir=str(output))
    merge(adapter=str(adapter), output_dir=str(output), overwrite=True)
    assert not (output / "stale").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


def test_an_untrained_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    adapted = load_adapted(ModelConfig(device="cpu"), AdapterConfig(adapter=str(adapter)))
    assert adapted.bank is not None
    assert adapted.adapter is not None
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in adapted.adapter.tensors.items()}
    merged_module_save(adapter, adapted.adapter.config, tensors, str(base))
    with pytest.raises(ConfigError, match="every lora_B"):
        merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))


def merged_module_save(folder: Path, config: object, tensors: dict, base: str) -> None:
    from lorafleet.files.adapter import save_adapter

    save_adapter(folder, config, tensors, base_name=base, metadata={})  # type: ignore[arg-type]


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path)
    other, _ = saved_adapter(tmp_path / "other", overrides={"seed": 5})
    with pytest.raises(AdapterError, match=r"weights of .* that it was trained on"):
        merge(adapter=str(adapter), model=str(other), output_dir=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    assert merge(adapter=str(adapter), model=str(other), output_dir=str(tmp_path / "merged"), check_base=False)


@pytest.mark.parametrize("fault", ["base written", "one tensor of another model", "lost tensor"])
def test_a_wrong_model_is_deleted(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = saved_adapter(tmp_path)
    good = merged_module.write_merged

    def spoil(plan: object, folder: Path) -> object:
        expected = good(plan, folder)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(base if fault == "base written" else folder)
        if fault != "base written":
            weight = model.model.norm.weight if fault == "lost tensor" else model.model.embed_tokens.weight
            with torch.no_grad():
                weight[3] += 1.0
        model.save_pretrained(folder)
        return expected

    monkeypatch.setattr(merged_module, "write_merged", spoil)
    with pytest.raises(AdapterError, match="failed its check") as error:
        merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))
    if fault == "base written":
        assert "have the base's bytes" in str(error.value)
        assert "logits differ" in str(error.value)
    else:
        assert "changed that the adapter does not touch" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = saved_adapter(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(AdapterError, match="No space left"):
        merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_sampling_settings_of_the_base_do_not_stop_the_merge(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    settings = json.loads((base / "generation_config.json").read_text()) | {"temperature": 0.6, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(settings))
    merge(adapter=str(adapter), output_dir=str(tmp_path / "merged"))
    assert GenerationConfig.from_pretrained(tmp_path / "merged").temperature == 0.6
