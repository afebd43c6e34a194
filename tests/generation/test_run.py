"""``generate``: prompts in, answers out, base and adapter side by side."""

import json
from pathlib import Path

import pytest

from lorafleet import generate
from lorafleet.config import AdapterConfig, GenerationConfig, ModelConfig, PromptConfig
from lorafleet.errors import AdapterError, ConfigError, DataError, ModelError
from lorafleet.generation import generate_ids
from lorafleet.generation.adapted import load_adapted
from lorafleet.generation.prompts import encode_prompts, read_prompts
from lorafleet.generation.streaming import answer_text
from tests.generation.tiny_bank import saved_adapter
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))


def test_answers_of_adapter_and_base(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path, scale=0.3)
    prompts = ["The quick fox", "What is the capital of France?", "one two"]
    result = generate(adapter=str(adapter), prompt=prompts, base=True, max_new_tokens=8)
    assert [answer.prompt for answer in result.answers] == prompts
    alone = generate(model=str(base), prompt=prompts, max_new_tokens=8)
    assert [answer.base_text for answer in result.answers] == [answer.text for answer in alone.answers]
    assert [answer.text for answer in result.answers] != [answer.text for answer in alone.answers]
    assert result.adapter == str(adapter)
    assert (alone.adapter, alone.answers[0].base_text) == (None, None)
    assert json.loads(json.dumps(result.as_dict()))["answers"][1]["text"] == result.answers[1].text
    assert result.tokens > sum(answer.tokens for answer in result.answers)


def test_the_prompt_is_rendered_by_the_chat_template(tmp_path: Path) -> None:
    base, _ = saved_adapter(tmp_path)
    adapted = load_adapted(ModelConfig(model_name_or_path=str(base), device="cpu"), AdapterConfig())
    tokenizer = adapted.base.tokenizer
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = generate_ids(adapted.base, None, [ids], [-1], GenerationConfig(max_new_tokens=6))[0]
    result = generate(model=str(base), prompt="one two", system_prompt="Be brief.", max_new_tokens=6)
    assert result.answers[0].text == answer_text(tokenizer, wanted)
    raw = generate(model=str(base), prompt="one two", raw_prompt=True, max_new_tokens=6)
    wanted = generate_ids(
        adapted.base, None, [tokenizer("one two").input_ids], [-1], GenerationConfig(max_new_tokens=6)
    )[0]
    assert raw.answers[0].text == answer_text(tokenizer, wanted)


def test_the_system_prompt_of_training_is_used(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, scale=0.3, metadata={"data": {"system_prompt": "You rate."}})
    knobs = {"adapter": str(adapter), "prompt": "one two", "max_new_tokens": 8}
    trained = generate(**knobs).answers[0].text
    assert trained == generate(**knobs, system_prompt="You rate.").answers[0].text
    assert trained != generate(**knobs, system_prompt=None).answers[0].text
    assert generate(**knobs, raw_prompt=True).answers


def test_streaming_gives_the_same_text(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, scale=0.3)
    pieces: list[str] = []
    knobs = {"prompt": "The quick fox", "base": True, "max_new_tokens": 12, "temperature": 1.0}
    streamed = generate(adapter=str(adapter), on_text=pieces.append, **knobs)
    assert "".join(pieces) == streamed.answers[0].text
    assert streamed.answers == generate(adapter=str(adapter), **knobs).answers


def test_the_template_of_the_adapter_is_used(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    model = ModelConfig(device="cpu")
    tokenizer = load_adapted(model, AdapterConfig(adapter=str(adapter))).base.tokenizer
    assert encode_prompts(read_prompts(PromptConfig(prompt="one two")), tokenizer, PromptConfig()) == [
        [*tokenizer("one two").input_ids, 2]
    ]
    other = tmp_path / "other.jinja"
    other.write_text("other {{ messages[0].content }}")
    tokenizer = load_adapted(model, AdapterConfig(adapter=str(adapter)), str(other)).base.tokenizer
    assert tokenizer.chat_template == "other {{ messages[0].content }}"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_adapted(model, AdapterConfig(adapter=str(adapter)), str(tmp_path / "absent.jinja"))
    (adapter / "chat_template.jinja").unlink()
    (adapter / "chat_template.jinja").symlink_to(other)
    with pytest.raises(AdapterError, match="link out of its folder"):
        load_adapted(model, AdapterConfig(adapter=str(adapter)))


def test_another_base_or_tokenizer_is_refused(tmp_path: Path) -> None:
    _, adapter = saved_adapter(tmp_path, metadata={"tokenizer_hash": "0" * 64, "base_weights_hash": "1" * 64})
    with pytest.raises(AdapterError) as error:
        generate(adapter=str(adapter), prompt="x", max_new_tokens=2)
    assert "weights" in str(error.value)
    assert "tokenizer or chat template" in str(error.value)
    assert generate(adapter=str(adapter), prompt="x", max_new_tokens=2, check_base=False).answers


def test_a_base_that_moved_is_named(tmp_path: Path) -> None:
    base, adapter = saved_adapter(tmp_path)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"The adapter in .* names this base"):
        generate(adapter=str(adapter), prompt="x", max_new_tokens=2)
    assert generate(adapter=str(adapter), model=str(tmp_path / "moved"), prompt="x", max_new_tokens=2).answers


def test_prompts_come_from_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.json: prompts are read from text.*\.jsonl"):
        read_prompts(PromptConfig(prompts_file="a.json"))
    lines = tmp_path / "prompts.txt"
    lines.write_text("\ufefffirst one\n\nsecond one\n", encoding="utf-8")
    assert [p.text for p in read_prompts(PromptConfig(prompts_file=str(lines)))] == ["first one", "second one"]
    rows = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows.write_text(
        json.dumps({"prompt": "p\u2028p"}, ensure_ascii=False) + "\n" + json.dumps({"messages": chat}) + "\n"
    )
    found = read_prompts(PromptConfig(prompts_file=str(rows)))
    assert [prompt.turns for prompt in found] == [({"role": "user", "content": "p\u2028p"},), tuple(chat[:2])]
    assert found[1].place == f"{rows}:2"


def test_bad_prompts_are_listed_together(tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    bad = ["{", "[]", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "robot", "content": "x"}]}']
    bad += ['{"messages": [{"role": "assistant", "content": "x"}]}', "[" * 100_000]
    rows.write_text("\n".join(bad))
    with pytest.raises(DataError) as error:
        read_prompts(PromptConfig(prompts_file=str(rows)))
    assert all(f"{rows}:{number}" in str(error.value) for number in range(1, len(bad) + 1))
    for config in (PromptConfig(), PromptConfig(prompt="x", prompts_file="y")):
        with pytest.raises(ConfigError, match="either prompt or prompts_file"):
            read_prompts(config)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(PromptConfig(prompts_file=str(tmp_path / "absent.txt")))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(PromptConfig(prompts_file=str(tmp_path / "empty.txt")))


def test_knobs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    base, _ = saved_adapter(tmp_path)
    with pytest.raises(ConfigError, match="name an adapter"):
        generate(model=str(base), prompt="x", base=True)
    with pytest.raises(ConfigError, match="at least one prompt"):
        generate(model=str(base), prompt=[])
    with pytest.raises(ConfigError, match="prompt 2 has"):
        generate(model=str(base), prompt=["x", "word " * 400], max_new_tokens=200)
    config = PromptConfig(prompt="x", raw_prompt=True, system_prompt="s")
    with pytest.raises(DataError, match="without turns"):
        encode_prompts(read_prompts(config), tiny_tokenizer(), config)


def test_control_strings_in_a_prompt_stay_text(tmp_path: Path) -> None:
    config = PromptConfig(prompt="say <|im_end|> now")
    tokenizer = tiny_tokenizer()
    ids = encode_prompts(read_prompts(config), tokenizer, config)[0]
    assert ids.count(2) == 1  # the template's own
    assert "say <|im_end|> now" in tokenizer.decode(ids)
