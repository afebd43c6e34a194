"""Shortened rows keep what they train, and the structure around it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.config.data import DataConfig
from lorafleet.data.conversation import BadRow, Conversation, PlainText, Turn
from lorafleet.data.encode import ChatEncoder, Sample
from lorafleet.data.truncation import shorten
from tests.data.chat_templates import with_template

TOKENIZER = with_template("chatml")
QUESTION, ANSWER = Turn("user", "Why?"), Turn("assistant", "Because.")


def encode(row: Conversation | PlainText, max_length: int, **knobs: object) -> Sample:
    (sample,) = ChatEncoder(TOKENIZER, DataConfig(data="", max_length=max_length, **knobs)).encode(row)
    return sample


def text_of(sample: Sample) -> str:
    return str(TOKENIZER.decode(sample.ids))


def trained_text(sample: Sample) -> str:
    return str(TOKENIZER.decode(sample.ids[sample.mask]))


def test_a_row_that_fits_is_not_touched() -> None:
    row = Conversation((QUESTION, ANSWER))
    length = len(encode(row, 1000).ids)
    assert not encode(row, length).truncated
    assert encode(row, length - 1).truncated


def test_a_long_question_loses_its_middle_and_the_answer_stays_whole() -> None:
    long = Turn("user", "START " + "and so on " * 200 + "END")
    sample = encode(Conversation((long, ANSWER)), 64)
    assert len(sample.ids) == 64
    assert trained_text(sample) == "Because.<|im_end|>"
    shown = text_of(sample)
    assert shown.startswith("<|im_start|>user\nSTART")
    assert "END<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>" in shown
    assert sample.truncated
    assert TOKENIZER.decode(sample.ids[slice(*sample.answer)]) == "Because.<|im_end|>"


def test_a_long_answer_is_cut_at_its_end() -> None:
    sample = encode(Conversation((QUESTION, Turn("assistant", "word " * 500))), 40)
    assert len(sample.ids) == 40
    assert trained_text(sample).startswith("word word")
    assert "<|im_end|>" not in trained_text(sample)
    assert text_of(sample).startswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nword")


def test_question_and_answer_share_the_room_when_both_are_long() -> None:
    row = Conversation((Turn("user", "question " * 500), Turn("assistant", "word " * 500)))
    sample = encode(row, 100)
    assert len(sample.ids) == 100
    assert 45 <= sample.mask.sum() <= 51


def test_later_turns_go_first_when_the_first_answer_fits() -> None:
    turns = (QUESTION, ANSWER, Turn("user", "more " * 300), Turn("assistant", "Late."))
    sample = encode(Conversation(turns, answer="late"), 60)
    assert trained_text(sample) == "Because.<|im_end|>"
    assert TOKENIZER.decode(sample.ids[slice(*sample.answer)]) == "Because.<|im_end|>"
    assert sample.reference == "Because."
    assert sample.final is None  # it belongs to the answer that was cut off


def test_the_last_answer_is_kept_when_only_that_is_trained() -> None:
    turns = (QUESTION, Turn("assistant", "long " * 300), QUESTION, Turn("assistant", "Short."))
    sample = encode(Conversation(turns), 60, loss_on="completion")
    assert len(sample.ids) == 60
    assert trained_text(sample) == "Short.<|im_end|>"
    assert text_of(sample).count("<|im_start|>") == 4


def test_plain_text_is_cut_at_its_end() -> None:
    sample = encode(PlainText("word " * 100), 20)
    assert len(sample.ids) == 20
    assert sample.mask.sum() == 19
    assert "<|im_end|>" not in text_of(sample)


def test_a_row_whose_answer_would_be_lost_is_refused_with_the_numbers() -> None:
    turns = tuple(turn for _ in range(20) for turn in (QUESTION, ANSWER))
    with pytest.raises(BadRow, match=r"all trained tokens would be lost: the row has \d+ tokens.*max_length is 32"):
        encode(Conversation(turns), 32, loss_on="completion")


def test_answers_that_are_their_own_sample_are_lost_one_by_one() -> None:
    turns = tuple(turn for _ in range(12) for turn in (QUESTION, ANSWER))
    encoder = ChatEncoder(with_template("qwen3"), DataConfig(data="", max_length=80))
    samples = encoder.encode(Conversation(turns, answer="x"))
    assert 1 < len(samples) < 12
    assert [sample.truncated for sample in samples] == [False] * (len(samples) - 1) + [True]
    assert all(sample.final is None for sample in samples)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_some_trained_token_always_stays_or_the_row_is_refused(data: st.DataObject) -> None:
    length = data.draw(st.integers(9, 400))
    start = data.draw(st.integers(1, length - 1))
    end = data.draw(st.integers(start + 1, length))
    max_length = data.draw(st.integers(8, length - 1))
    control = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    trained = np.zeros(length, dtype=bool)
    trained[start:end] = True
    try:
        kept = shorten(trained, (start, end), control, max_length)
    except BadRow:
        assert control[:start].sum() + 16 * (np.diff(control[:start].astype(int)) < 0).sum() + 16 >= max_length
        return
    assert len(kept) <= max_length
    assert (np.diff(kept) > 0).all()
    assert trained[kept].any()
    assert set(np.flatnonzero(control[:start])) <= set(kept)
    lost = set(range(start, end)) - set(kept)
    assert not lost or min(lost) > max(set(kept) & set(range(start, end)))  # an answer loses only its end
