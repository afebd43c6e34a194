"""The demo base: converted once, complete, and a model that talks."""

import logging
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from lorafleet.config import ModelConfig
from lorafleet.errors import ConfigError, MissingExtraError, ModelError
from lorafleet.models import demo
from lorafleet.models.demo import DEMO_BASE, demo_base_folder, demo_base_place
from lorafleet.models.load import Base, load_base


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(ModelConfig(model_name_or_path=DEMO_BASE, device="cpu"))


def test_it_is_what_the_package_carries(base: Base) -> None:
    assert base.name == DEMO_BASE
    assert base.source == str(demo_base_place())
    assert base.dtype == torch.float32
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    tokenizer = base.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert base.model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192


def test_its_tokenizer_round_trips_and_cuts_digits(base: Base) -> None:
    text = "It's  2024:\n\n\tüber 今天 🎉 <|im_end|>"
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == text
    assert base.tokenizer.tokenize("rated  35/50") == ["rated", "ĠĠ", "3", "5", "/", "5", "0"]


def test_it_talks(base: Base) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = base.model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert base.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_a_second_load_changes_nothing(base: Base) -> None:
    again = load_base(ModelConfig(model_name_or_path=DEMO_BASE, device="cpu"))
    assert (again.weights_hash, again.tokenizer_hash) == (base.weights_hash, base.tokenizer_hash)


def convert_slowly(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "part").write_text("1")
    time.sleep(0.4)
    with (folder.parent / "conversions").open("a") as file:
        file.write("x")
    (folder / "rest").write_text("2")


def race() -> None:
    demo._convert_gguf = convert_slowly  # type: ignore[assignment]
    folder = demo_base_folder()
    assert sorted(path.name for path in folder.iterdir()) == ["part", "rest"]


def test_processes_that_start_together_convert_once(own_cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=race) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (own_cache / "conversions").read_text() == "x"


def test_a_conversion_that_was_killed_is_done_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "part").write_text("1")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert_gguf", die)
    with pytest.raises(KeyboardInterrupt):
        demo_base_folder()
    assert not demo_base_place().exists()
    monkeypatch.setattr(demo, "_convert_gguf", convert_slowly)
    caplog.set_level(logging.INFO)
    assert demo_base_folder() == demo_base_place() == own_cache / "smollm2-135m-2"
    assert "unpacking the demo base" in caplog.text
    assert not list(own_cache.glob(".*partial"))


def test_what_stops_it_is_named(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(model_name_or_path=DEMO_BASE)
    with pytest.raises(ConfigError, match="is for hub models"):
        load_base(config.model_copy(update={"revision": "main"}))
    monkeypatch.setattr(demo, "_NEEDED_BYTES", 1 << 60)
    with pytest.raises(ModelError, match=r"needs .* GB, but .* LORAFLEET_CACHE"):
        load_base(config)
    own_cache.joinpath("x").parent.mkdir(exist_ok=True)
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write the demo base .* LORAFLEET_CACHE"):
        load_base(config)
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorafleet\[demo\]'"):
        load_base(config)
