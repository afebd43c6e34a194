"""The real tokenizer and template of the demo base, on the packaged sample."""

from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lorafleet.config.data import DataConfig
from lorafleet.config.model import ModelConfig
from lorafleet.data.conversation import Conversation, Turn
from lorafleet.data.encode import ChatEncoder
from lorafleet.data.load import load_data
from lorafleet.models.load import load_tokenizer

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(model_name_or_path="smollm2-135m"))


def test_the_packaged_sample_is_read_whole_and_trains_the_labels_alone(tmp_path: Path) -> None:
    data = load_data(DataConfig(data="sample:movie_polarity"), tokenizer(), cache_folder=tmp_path)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 2300, "valid": 332, "test": 500}
    assert data.labels == ("negative", "positive")
    for row in data.splits["test"]:
        assert tuple(row.input_ids[row.loss_mask].tolist()) == data.label_ids[data.labels.index(row.reference)]
        assert row.loss_mask[row.prompt_length]
        assert not row.loss_mask[: row.prompt_length].any()
    report = data.report
    assert sum(split.rejected + split.truncated for split in report.splits.values()) == 0
    assert report.warnings == ()
    assert report.example.text.endswith("<|im_start|>assistant\n«negative<|im_end|>»\n")


def test_every_token_of_a_long_conversation() -> None:
    turns = [
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "你好 👍🏽\n\n  indented"),
        ("assistant", "Good:\n- a\n- b\n"),
    ]
    row = Conversation(tuple(Turn(role, content) for role, content in turns))  # type: ignore[arg-type]
    encoder = ChatEncoder(tokenizer())
    (sample,) = encoder.encode(row)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert sample.ids.tolist() == tokenizer().apply_chat_template(messages, return_dict=False)
    pieces = [
        (f"{SYSTEM}<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("4<|im_end|>", True),
        ("\n<|im_start|>user\n你好 👍🏽\n\n  indented<|im_end|>\n<|im_start|>assistant\n", False),
        ("Good:\n- a\n- b\n<|im_end|>", True),
        ("\n", False),
    ]
    lengths = [len(tokenizer()(text, add_special_tokens=False)["input_ids"]) for text, _ in pieces]
    expected = [trained for (_, trained), length in zip(pieces, lengths, strict=True) for _ in range(length)]
    assert sample.mask.tolist() == expected
    assert encoder.prompt_ids(row.turns[:-1]) == sample.ids[: sample.answer[0]].tolist()
    assert encoder.stop_ids == (tokenizer().eos_token_id,)
    assert encoder.warnings == []


def test_control_strings_of_the_real_tokenizer_stay_text() -> None:
    names = [token.content for token in tokenizer().added_tokens_decoder.values()]
    (sample,) = ChatEncoder(tokenizer()).encode(
        Conversation((Turn("user", " ".join(names)), Turn("assistant", "".join(names))))
    )
    control = [i for i in sample.ids.tolist() if i in tokenizer().added_tokens_decoder]
    assert tokenizer().convert_ids_to_tokens(control) == ["<|im_start|>", "<|im_end|>"] * 3
    assert " ".join(names) in tokenizer().decode(sample.ids)
    assert tokenizer().decode(sample.ids[sample.mask]) == "".join(names) + "<|im_end|>"
