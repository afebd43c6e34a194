"""Which tokens are trained, token by token, for templates of every kind."""

from collections.abc import Sequence

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lorafleet.config.data import DataConfig
from lorafleet.data.conversation import BadRow, Conversation, Turn
from lorafleet.data.encode import ChatEncoder, Sample
from lorafleet.errors import ConfigError
from tests.data.chat_templates import with_template

Q1, A1 = Turn("user", "What is the capital of France?"), Turn("assistant", "Paris is the capital.")
Q2, A2 = Turn("user", "And of Italy?"), Turn("assistant", "Rome: 100%, sure!")
SYSTEM = Turn("system", "You are helpful.")
THINKING = Turn("assistant", "<think>\nFrance, so Paris.\n</think>\n\nParis.")

# A piece of text, and whether it is trained. Pieces meet where no token of the tests' tokenizer spans them.
Pieces = Sequence[tuple[str, bool]]


def config(**knobs: object) -> DataConfig:
    return DataConfig(data="", **knobs)


def check(sample: Sample, tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> None:
    """The sample's tokens are those of the pieces, and exactly the trained pieces' tokens are trained."""
    ids, mask = [], []
    for text, trained in pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [trained] * len(piece)
    assert sample.ids.tolist() == ids
    shown = [(tokenizer.decode([i]), bool(m)) for i, m in zip(ids, sample.mask, strict=True)]
    assert sample.mask.tolist() == mask, shown
    answer = [text for text, trained in pieces if trained][-1]
    start, end = sample.answer
    assert tokenizer.decode(sample.ids[start:end]) == answer


def chatml(turn: Turn, trained: bool = False) -> Pieces:
    role, end = f"<|im_start|>{turn.role}\n", f"{turn.content}<|im_end|>"
    return [(role, False), (end, True), ("\n", False)] if trained else [(f"{role}{end}\n", False)]


@pytest.mark.parametrize("name", ["chatml", "marked", "marked without end"])
@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
def test_chatml_with_and_without_markers(name: str, loss_on: str) -> None:
    tokenizer = with_template(name)
    row = Conversation((SYSTEM, Q1, A1, Q2, A2))
    (sample,) = ChatEncoder(tokenizer, config(loss_on=loss_on)).encode(row)
    both = loss_on == "assistant"
    check(sample, tokenizer, [*chatml(SYSTEM), *chatml(Q1), *chatml(A1, both), *chatml(Q2), *chatml(A2, True)])
    assert sample.strategy == ("prefix" if name == "chatml" else "markers")
    assert sample.reference == A2.content


def test_all_tokens_but_the_first_are_trained_with_loss_on_all() -> None:
    tokenizer = with_template("chatml")
    (sample,) = ChatEncoder(tokenizer, config(loss_on="all")).encode(Conversation((Q1, A1, Q2)))
    assert not sample.mask[0]
    assert sample.mask[1:].all()
    assert "Italy" in tokenizer.decode(sample.ids)
    start, end = sample.answer
    assert tokenizer.decode(sample.ids[start:end]) == f"{A1.content}<|im_end|>"


def test_llama3_trains_the_answers_and_their_end_of_turn() -> None:
    tokenizer = with_template("llama3")
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((SYSTEM, Q1, A1, Q2, A2)))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    check(
        sample,
        tokenizer,
        [
            ("<|begin_of_text|>" + head.format("system") + "You are helpful.<|eot_id|>", False),
            (head.format("user") + Q1.content + "<|eot_id|>" + head.format("assistant"), False),
            (A1.content + "<|eot_id|>", True),
            (head.format("user") + Q2.content + "<|eot_id|>" + head.format("assistant"), False),
            (A2.content + "<|eot_id|>", True),
        ],
    )
    assert sample.strategy == "prefix"


def test_qwen3_single_turn_trains_the_empty_thinking_block_that_it_will_generate() -> None:
    tokenizer = with_template("qwen3")
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((Q1, A1)))
    answer = ("<think>\n\n</think>\n\n" + A1.content + "<|im_end|>", True)
    check(sample, tokenizer, [*chatml(Q1), ("<|im_start|>assistant\n", False), answer, ("\n", False)])


def test_qwen3_many_turns_become_one_sample_for_each_answer() -> None:
    tokenizer = with_template("qwen3")
    first, second = ChatEncoder(tokenizer).encode(Conversation((Q1, THINKING, Q2, A2)))
    thought = ("<think>\nFrance, so Paris.\n</think>\n\nParis.<|im_end|>", True)
    check(first, tokenizer, [*chatml(Q1), ("<|im_start|>assistant\n", False), thought, ("\n", False)])
    history = [*chatml(Q1), *chatml(Turn("assistant", "Paris."))]
    last = ("<think>\n\n</think>\n\n" + A2.content + "<|im_end|>", True)
    check(second, tokenizer, [*history, *chatml(Q2), ("<|im_start|>assistant\n", False), last, ("\n", False)])
    assert {first.strategy, second.strategy} == {"per-turn"}
    assert (first.reference, second.reference) == (THINKING.content, A2.content)


def test_only_the_last_sample_of_a_row_carries_its_final_answer() -> None:
    row = Conversation((Q1, A1, Q2, A2), references=("Rome",), answer="100")
    first, second = ChatEncoder(with_template("qwen3")).encode(row)
    assert (first.final, first.references) == (None, ())
    assert (second.final, second.references) == ("100", ("Rome",))


def test_gemma_gets_the_system_text_in_its_first_question() -> None:
    tokenizer = with_template("gemma")
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((SYSTEM, Q1, A1, Q2, A2)))
    check(
        sample,
        tokenizer,
        [
            ("<|begin_of_text|><start_of_turn>user\nYou are helpful.\n\n" + Q1.content + "<end_of_turn>\n", False),
            ("<start_of_turn>model\n", False),
            (A1.content + "<end_of_turn>", True),
            ("\n<start_of_turn>user\n" + Q2.content + "<end_of_turn>\n<start_of_turn>model\n", False),
            (A2.content + "<end_of_turn>", True),
            ("\n", False),
        ],
    )


def test_phi3_is_one_sample_although_it_ends_the_text_after_every_render() -> None:
    tokenizer = with_template("phi3")
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((Q1, A1, Q2, A2)))
    check(
        sample,
        tokenizer,
        [
            (f"<|user|>\n{Q1.content}<|end|>\n<|assistant|>\n", False),
            (f"{A1.content}<|end|>", True),
            (f"\n<|user|>\n{Q2.content}<|end|>\n<|assistant|>\n", False),
            (f"{A2.content}<|end|>", True),
            ("\n<|endoftext|>", False),
        ],
    )


def test_mistral_moves_the_system_text_so_each_answer_is_its_own_sample() -> None:
    tokenizer = with_template("mistral")
    first, second = ChatEncoder(tokenizer).encode(Conversation((SYSTEM, Q1, A1, Q2, A2)))
    start = "<|begin_of_text|>[INST] "
    answers = [(f" {turn.content}<|endoftext|>", True) for turn in (A1, A2)]
    check(first, tokenizer, [(f"{start}You are helpful.\n\n{Q1.content} [/INST]", False), answers[0]])
    history = f"{start}{Q1.content} [/INST] {A1.content}<|endoftext|>[INST] You are helpful.\n\n{Q2.content} [/INST]"
    check(second, tokenizer, [(history, False), answers[1]])


def test_a_generation_prompt_that_opens_the_thinking_is_warned_about() -> None:
    tokenizer = with_template("r1")
    encoder = ChatEncoder(tokenizer)
    (sample,) = encoder.encode(Conversation((Q1, A1)))
    prompt = (f"<|begin_of_text|><|user|>{Q1.content}<|assistant|>", False)
    check(sample, tokenizer, [prompt, (f"{A1.content}<|endoftext|>", True)])
    assert any("generation prompt" in warning for warning in encoder.warnings)


def test_the_end_is_added_and_trained_where_the_template_writes_none() -> None:
    tokenizer = with_template("no end")
    encoder = ChatEncoder(tokenizer)
    (sample,) = encoder.encode(Conversation((Q1, A1, Q2, A2)))
    assert tokenizer.decode(sample.ids[sample.mask]) == f" {A1.content}\n{A2.content}\n<|endoftext|>"
    assert encoder.stop_ids == (tokenizer.eos_token_id,)
    assert any("never learn to stop" in warning for warning in encoder.warnings)
    # The template writes "assistant: ", whose space belongs to the answer's first token.
    assert any("tokenized together" in warning for warning in encoder.warnings)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "marked", "gemma", "phi3", "plain"])
def test_good_templates_are_not_warned_about(name: str) -> None:
    tokenizer = with_template(name)
    tokenizer.eos_token = ChatEncoder(tokenizer).end_of_turn
    assert ChatEncoder(tokenizer).warnings == []


def test_the_plain_template_serves_models_without_one() -> None:
    tokenizer = with_template("plain")
    encoder = ChatEncoder(tokenizer)
    (sample,) = encoder.encode(Conversation((SYSTEM, Q1, A1, Q2, A2)))
    check(
        sample,
        tokenizer,
        [
            (f"<|begin_of_text|>System: You are helpful.\n\nUser: {Q1.content}\n\nAssistant:", False),
            (f" {A1.content}<|endoftext|>", True),
            (f"\n\nUser: {Q2.content}\n\nAssistant:", False),
            (f" {A2.content}<|endoftext|>", True),
        ],
    )
    assert (sample.strategy, encoder.template.name) == ("markers", "plain")
    prompt = encoder.prompt_ids([Q1])
    assert tokenizer.decode(prompt) == f"<|begin_of_text|>User: {Q1.content}\n\nAssistant:"


def test_markers_that_enclose_the_header_train_it_and_generation_begins_behind_it() -> None:
    tokenizer = with_template("marked header")
    encoder = ChatEncoder(tokenizer)
    (sample,) = encoder.encode(Conversation((Q1, A1)))
    assert tokenizer.decode(sample.ids[sample.mask]) == f"<|im_start|>assistant\n{A1.content}<|im_end|>"
    assert tokenizer.decode(sample.ids[slice(*sample.answer)]) == f"{A1.content}<|im_end|>"
    (ids,) = encoder.answer_ids(["positive"])
    assert tokenizer.decode(ids) == "positive<|im_end|>"


def test_templates_that_want_parts_get_parts() -> None:
    tokenizer = with_template("parts")
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((SYSTEM, Q1, A1)))
    check(sample, tokenizer, [*chatml(SYSTEM), *chatml(Q1), *chatml(A1, True)])


def test_a_template_that_leaves_out_the_text_is_refused() -> None:
    tokenizer = with_template("chatml")
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.role }}<|im_end|>{% endfor %}"
    with pytest.raises(ConfigError, match="it leaves out the text of turns"):
        ChatEncoder(tokenizer)


def test_both_ends_stop_generation_where_turn_and_text_end_differently() -> None:
    tokenizer = with_template("chatml")
    tokenizer.eos_token = "<|endoftext|>"
    encoder = ChatEncoder(tokenizer)
    assert encoder.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id)
    assert any("stop at both" in warning for warning in encoder.warnings)


@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "qwen3", "marked", "marked header", "parts", "gemma", "phi3", "mistral", "plain"]
)
def test_what_comes_before_the_answer_is_what_generation_starts_from(name: str) -> None:
    encoder = ChatEncoder(with_template(name))
    for turns in ((Q1, A1), (Q1, A1, Q2, A2), (SYSTEM, Q1, A1)):
        sample = encoder.encode(Conversation(turns))[-1]
        assert sample.ids[: sample.answer[0]].tolist() == encoder.prompt_ids(turns[:-1])


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "marked", "gemma", "phi3", "mistral", "no end", "plain"])
def test_label_ids_are_the_tokens_that_rows_train(name: str) -> None:
    encoder = ChatEncoder(with_template(name))
    labels = ("positive", "negative", "very odd label")
    for label, ids in zip(labels, encoder.answer_ids(labels), strict=True):
        (sample,) = encoder.encode(Conversation((Q1, Turn("assistant", label))))
        assert tuple(sample.ids[sample.mask].tolist()) == ids
        assert ids[-1] in encoder.stop_ids


def test_context_turns_and_an_opening_answer_are_not_trained() -> None:
    tokenizer = with_template("chatml")
    hello, quiet = Turn("assistant", "Hello, how can I help?"), Turn("assistant", A1.content, trained=False)
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((hello, Q1, quiet, Q2, A2, Q1)))
    check(sample, tokenizer, [*chatml(hello), *chatml(Q1), *chatml(quiet), *chatml(Q2), *chatml(A2, True)])


def test_the_system_prompt_is_for_rows_that_have_none() -> None:
    tokenizer = with_template("chatml")
    encoder = ChatEncoder(tokenizer, config(system_prompt="Be brief."))
    (own,), (given,) = encoder.encode(Conversation((SYSTEM, Q1, A1))), encoder.encode(Conversation((Q1, A1)))
    check(own, tokenizer, [*chatml(SYSTEM), *chatml(Q1), *chatml(A1, True)])
    check(given, tokenizer, [*chatml(Turn("system", "Be brief.")), *chatml(Q1), *chatml(A1, True)])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((Q1, Q2, A1), "the chat template refuses the turns: Conversation roles must alternate"),
        ((A1,), "no assistant turn after another turn"),
        ((Q1, Turn("assistant", "x", trained=False)), "no assistant turn is trained"),
    ],
)
def test_rows_without_an_answer_that_can_be_found_are_refused(turns: tuple[Turn, ...], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        ChatEncoder(with_template("gemma")).encode(Conversation(turns))


def test_the_space_before_an_answer_is_trained_when_offsets_are_trimmed() -> None:
    tokenizer = with_template("mistral")
    assert tokenizer.backend_tokenizer.pre_tokenizer.__getstate__()  # byte level, whose offsets leave out the space
    (sample,) = ChatEncoder(tokenizer).encode(Conversation((Q1, Turn("assistant", "positive"))))
    trained = tokenizer.decode(sample.ids[sample.mask])
    assert trained == " positive<|endoftext|>"
    assert np.flatnonzero(sample.mask)[0] == sample.answer[0]
