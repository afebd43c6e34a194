"""Every kind of method through ``train``, its files, ``eval`` and ``generate``."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorafleet
from lorafleet.config.model import ModelConfig
from lorafleet.config.use import AdapterConfig
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.generation.adapted import load_adapted
from lorafleet.lora.slots import answering
from lorafleet.training.run import train
from tests.tiny import tiny_base_folder
from tests.training.test_resume import make_place

METHODS = {
    "bottleneck:bottleneck_size=4": "llama",
    "bitfit": "gpt2",
    "prefix:num_virtual_tokens=3": "llama",
    "prompt:num_virtual_tokens=3": "llama",
    "p_tuning:num_virtual_tokens=3,encoder_hidden_size=16": "llama",
    "ia3": "llama",
    "loha:r=2,target_modules=[q_proj,down_proj]": "llama",
    "dora:r=2": "llama",
}
PROMPTS = ["the movie was", "one two three four five six seven", "dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("methods"))
    for arch in {*METHODS.values()}:
        tiny_base_folder(folder / arch, arch)
    return folder


def settings(place: Path, method: str, output: str, **knobs: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(place / METHODS.get(method, "llama")),
        "data": str(place / "rows.jsonl"),
        "method": method,
        "output_dir": str(place / output),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "device": "cpu",
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        **knobs,
    }


def place_for(output: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in output)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_what_is_loaded(place: Path, method: str) -> None:
    output = place_for(method)
    knobs = settings(place, method, output)
    result = train(knobs)
    assert result.eval_loss != result.eval_loss_before
    again = lorafleet.evaluate(adapter=result.adapter, data=knobs["data"], split="valid", device="cpu", answers=False)
    assert again.metrics["adapter"]["loss"] == pytest.approx(result.eval_loss, rel=1e-5)
    assert again.metrics["base"]["loss"] == pytest.approx(result.eval_loss_before, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_answers_do_not_depend_on_the_batch_and_follow_the_logits(place: Path, method: str) -> None:
    folder = place / place_for(method)
    if not folder.exists():
        train(settings(place, method, folder.name))
    asked: dict[str, Any] = {"adapter": str(folder), "raw_prompt": True, "max_new_tokens": 6, "device": "cpu"}
    together = lorafleet.generate(prompt=PROMPTS, base=True, **asked)
    alone = [lorafleet.generate(prompt=prompt, base=True, **asked).answers[0] for prompt in PROMPTS]
    assert [(a.text, a.base_text) for a in together.answers] == [(a.text, a.base_text) for a in alone]
    adapted = load_adapted(ModelConfig(device="cpu"), AdapterConfig(adapter=str(folder)))
    ids = adapted.base.tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    for _ in range(6):
        with torch.no_grad():
            model = answering(adapted.base.model, adapted.bank)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    wanted = adapted.base.tokenizer.decode(ids[0, -6:])
    assert wanted.startswith(together.answers[1].text) and together.answers[1].text


@pytest.mark.parametrize("method", [name for name, arch in METHODS.items() if name not in ("bitfit",)])
def test_peft_loads_its_own_methods_with_the_same_logits(place: Path, method: str) -> None:
    if method.startswith("bottleneck"):
        return
    folder = place / place_for(method)
    if not folder.exists():
        train(settings(place, method, folder.name))
    adapted = load_adapted(ModelConfig(device="cpu"), AdapterConfig(adapter=str(folder)))
    base = AutoModelForCausalLM.from_pretrained(place / METHODS[method])
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([[5, 9, 200, 33, 71]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = answering(adapted.base.model, adapted.bank)(input_ids=ids, attention_mask=mask).logits
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_model_trains_resumes_and_is_loaded_as_a_model(place: Path) -> None:
    once = train(settings(place, "full", "full"))
    assert once.adapter == str(place / "full" / "model")
    assert once.trainable_parameters == once.total_parameters
    found = lorafleet.evaluate(model=once.adapter, data=str(place / "rows.jsonl"), split="valid", device="cpu")
    assert found.metrics["base"]["loss"] == pytest.approx(once.eval_loss, rel=1e-5)
    knobs = settings(place, "full", "twice", save_strategy="steps", save_steps=2)
    whole = train(knobs)
    for path in (place / "twice").glob("checkpoint-4"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = train(knobs, resume_from_checkpoint=True)
    assert resumed.train_loss == whole.train_loss
    weights = [(Path(one.adapter) / "model.safetensors").read_bytes() for one in (once, whole, resumed)]
    assert weights[0] == weights[1] == weights[2]
    with pytest.raises(AdapterError, match="holds a whole model, no adapter; name it with model"):
        lorafleet.generate(adapter=once.adapter, prompt="x")


def test_a_run_s_own_settings_run_again(place: Path) -> None:
    first = train(settings(place, "ia3", "ia3-first", learning_rate=None) | {"learning_rate": 3e-3})
    again = train(str(place / "ia3-first" / "lorafleet.yaml"), output_dir=str(place / "ia3-again"))
    assert again.train_loss == first.train_loss


@pytest.mark.parametrize(
    ("knobs", "fault"),
    [
        ({"method": "lorra"}, "there is no such method; did you mean 'lora'"),
        ({"method": "full", "r": 4}, "method full has no knobs of lora; given are r"),
        ({"method": "ia3", "loraplus_lr_ratio": 4}, "method ia3 has no knobs of lora; given are loraplus_lr_ratio"),
        ({"method": "full,lora"}, "names 2 methods; a run trains one"),
        ({"method": "ia3", "gradient_checkpointing": True}, "gradient_checkpointing works with lora, not with ia3"),
    ],
)
def test_bad_methods_stop_before_anything_is_loaded(place: Path, knobs: dict[str, Any], fault: str) -> None:
    given = settings(place, "lora", "never") | knobs | {"model_name_or_path": "/nowhere"}
    with pytest.raises(ConfigError, match=fault):
        train(given)


def test_an_architecture_that_cannot_take_a_method_is_named(place: Path) -> None:
    with pytest.raises(lorafleet.errors.ModelError, match="has no biases, so bitfit has nothing to train"):
        train(settings(place, "bitfit", "never") | {"model_name_or_path": str(place / "llama")})


def test_merging_is_for_lora(place: Path) -> None:
    folder = place / place_for("ia3")
    if not folder.exists():
        train(settings(place, "ia3", folder.name))
    with pytest.raises(ConfigError, match="is ia3; merging folds LoRA into its base"):
        lorafleet.merge(adapter=str(folder), output_dir=str(place / "merged"))
