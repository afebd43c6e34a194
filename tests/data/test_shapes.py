"""Rows of every shape: recognized, converted, and refused with the reason."""

from typing import Any

import pytest

from lorafleet.data.conversation import BadRow, Conversation, Labelled, PlainText, Turn, fingerprint, opening
from lorafleet.data.shapes import SHAPES, convert_row, detect_shape
from lorafleet.errors import DataError

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text_label": {"text": "q", "label": "a"},
    "text": {"text": "q"},
}
USER, ASSISTANT = Turn("user", "q"), Turn("assistant", "a")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_detected_and_converted(shape: str) -> None:
    assert set(ROWS) == set(SHAPES)
    assert detect_shape([("f:1", ROWS[shape])]) == shape
    row = convert_row(shape, ROWS[shape])
    if shape == "text_label":
        assert row == Labelled("q", "a")
    elif shape == "text":
        assert row == PlainText("q")
    else:
        assert row == Conversation((USER, ASSISTANT))


def test_most_rows_decide_and_null_fields_do_not_count() -> None:
    rows = [ROWS["text"] | {"label": None}, ROWS["text"] | {"label": None}, ROWS["messages"]]
    assert detect_shape((f"f:{i}", row) for i, row in enumerate(rows)) == "text"


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"question": "q", "answer": "a"}, "Nearest is prompt_completion: rename 'question' to 'prompt', 'answer' to"),
        ({"sentence": "q", "sentiment": 1}, "Nearest is text_label: rename 'sentence' to 'text', 'sentiment' to"),
        ({"dialog": []}, "Nearest is messages: rename 'dialog' to 'messages'"),
        ({"instruction": "q", "response": "a"}, "Nearest is alpaca: rename 'response' to 'output'"),
        ({"txet": "q"}, "Nearest is text: rename 'txet' to 'text'"),
        ({"zzz": "q", "yyy": 1}, "Rename the fields to one of these shapes"),
    ],
)
def test_unknown_fields_are_listed_with_the_known_shapes_and_the_nearest(row: dict[str, Any], hint: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_shape([("rows.jsonl:3", row)])
    message = str(caught.value)
    assert hint in message
    assert "rows.jsonl:3" in message
    assert all(repr(name) in message for name in row)
    assert all(shape in message for shape in SHAPES)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "q", "input": "more", "output": "a"}, (Turn("user", "q\n\nmore"), ASSISTANT)),
        ({"instruction": "", "input": "q", "output": "a"}, (USER, ASSISTANT)),
        ({"instruction": "q", "output": "a", "system": "s"}, (Turn("system", "s"), USER, ASSISTANT)),
        ({"instruction": "q", "output": "a", "system": "", "history": []}, (USER, ASSISTANT)),
        (
            {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
            (Turn("user", "q0"), Turn("assistant", "a0"), USER, ASSISTANT),
        ),
        ({"instruction": "q", "references": ["a", "b"]}, (USER, ASSISTANT)),
    ],
)
def test_alpaca_rows(row: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    assert detect_shape([("f:1", row)]) == "alpaca"
    converted = convert_row("alpaca", row)
    assert isinstance(converted, Conversation)
    assert converted.turns == turns


def test_sharegpt_speakers_and_the_system_field() -> None:
    turns = [("human", "q"), ("gpt", "a"), ("observation", "tool says"), ("chatgpt", "b")]
    row = {"system": "s", "conversations": [{"from": who, "value": text} for who, text in turns]}
    converted = convert_row("sharegpt", row)
    assert isinstance(converted, Conversation)
    assert [turn.role for turn in converted.turns] == ["system", "user", "assistant", "tool", "assistant"]
    as_messages = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert convert_row("sharegpt", as_messages) == Conversation((USER, ASSISTANT))


def test_prompt_and_completion_may_be_lists_of_messages_and_only_the_completion_is_trained() -> None:
    prompt = [*ROWS["messages"]["messages"], {"role": "user", "content": "q2"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "a2"}]}
    converted = convert_row("prompt_completion", row)
    assert isinstance(converted, Conversation)
    assert [turn.content for turn in converted.turns if turn.role == "assistant" and turn.trained] == ["a2"]


def test_references_and_final_answers() -> None:
    row = convert_row("prompt_completion", {"prompt": "q", "references": ["a", "b"], "answer": 7})
    assert row == Conversation((USER, ASSISTANT), references=("a", "b"), answer="7")
    assert convert_row("messages", ROWS["messages"] | {"answer": " 42 "}) == Conversation(
        (USER, ASSISTANT), answer="42"
    )
    assert convert_row("messages", ROWS["messages"] | {"answer": ""}) == Conversation((USER, ASSISTANT))


def test_message_details_of_other_tools() -> None:
    parts = [{"type": "text", "text": "q"}]
    quiet = {"role": "assistant", "content": "old", "weight": 0, "tool_calls": None}
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": parts},
        quiet,
        {"role": "user", "content": "q"},
    ]
    row = convert_row("messages", {"messages": [*turns, {"role": "assistant", "content": "a"}], "tools": None})
    assert row == Conversation((USER, Turn("assistant", "old", trained=False), USER, ASSISTANT))


@pytest.mark.parametrize(
    ("value", "label"), [("pos", "pos"), (" pos ", "pos"), (0, "0"), (2.0, "2"), (True, "true"), (-1, "-1")]
)
def test_labels_are_text(value: Any, label: str) -> None:
    assert convert_row("text_label", {"text": "q", "label": value}) == Labelled("q", label)


def turns(*values: Any) -> dict[str, Any]:
    return {"messages": list(values)}


ASK, REPLY = ROWS["messages"]["messages"]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": "hello"}, "messages must be a list of turns, not the text 'hello'"),
    ("messages", {"messages": "[{"}, "a cell that starts like a list is broken JSON"),
    ("messages", {"messages": None}, "messages must be a list of turns, not null"),
    ("messages", turns(), "messages is empty"),
    ("messages", turns("hi"), r"messages\[0\] must be an object with role and content, not the text 'hi'"),
    ("messages", turns(ASK, {"role": "assistant"}), r"messages\[1\] has no 'content'; its fields are 'role'"),
    ("messages", turns(ASK, {"content": "a"}), r"messages\[1\] has no 'role'"),
    ("messages", turns(ASK, {"role": "asistant", "content": "a"}), "'asistant'; roles are .* mean 'assistant'"),
    ("messages", turns(ASK, {"role": 3, "content": "a"}), r"messages\[1\].role is the number 3"),
    ("messages", turns(ASK, {"role": "assistant", "content": None}), r"messages\[1\].content must be text, not null"),
    ("messages", turns(ASK, {"role": "assistant", "content": 3.5}), "must be text, not the number 3.5"),
    ("messages", turns(ASK, {"role": "assistant", "content": {"a": 1}}), "must be text, not an object"),
    ("messages", turns(ASK, {"role": "assistant", "content": ["a"]}), "must be text, not a list"),
    ("messages", turns(ASK, {"role": "assistant", "content": " \n"}), r"messages\[1\].content is empty"),
    ("messages", turns({"role": "user", "content": [{"type": "image"}]}, REPLY), "parts of the kind image"),
    ("messages", turns(ASK, REPLY | {"tool_calls": [{}]}), r"messages\[1\] calls a tool"),
    ("messages", turns(ASK, REPLY) | {"tools": [{}]}, "tools are not supported"),
    ("messages", turns(ASK), "there is no assistant turn to train"),
    ("messages", turns(ASK, REPLY) | {"answer": [1]}, "answer must be text, not a list"),
    ("messages", turns(ASK, REPLY) | {"answer": float("nan")}, "answer must be text, not NaN"),
    ("messages", {"text": "q"}, "wrong fields: 'text'; a row of the shape messages has"),
    ("sharegpt", {"conversations": [{"from": "human", "value": 1}]}, r"conversations\[0\].value must be text"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\].from is the text 'alien'"),
    ("sharegpt", {"system": "s", "conversations": [{"from": "system", "value": "t"}]}, "there are two system texts"),
    ("alpaca", {"instruction": "q", "output": None}, "output must be text, not null"),
    ("alpaca", {"instruction": "q", "output": ""}, "output is empty"),
    ("alpaca", {"instruction": " ", "input": "", "output": "a"}, "instruction is empty"),
    ("alpaca", {"instruction": ["q"], "output": "a"}, "instruction must be text, not a list"),
    ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history must be a list"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, r"history\[0\] must be \[question, answer\]"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x", 1]]}, r"history\[0\]\[1\] must be text"),
    ("prompt_completion", {"prompt": "q", "completion": float("nan")}, "completion must be text, not NaN"),
    ("prompt_completion", {"prompt": "", "completion": "a"}, "prompt is empty"),
    ("prompt_completion", {"prompt": "q", "references": []}, "completion must be text, not null"),
    ("prompt_completion", {"prompt": "q", "references": [1]}, r"references\[0\] must be text"),
    ("text_label", {"text": "q", "label": ""}, "label is empty"),
    ("text_label", {"text": "q", "label": 0.5}, "label must be text or a whole number, not the number 0.5"),
    ("text_label", {"text": "q", "label": None}, "label must be text or a whole number, not null"),
    ("text_label", {"text": None, "label": "a"}, "text must be text, not null"),
    ("text", {"text": "a\x00b"}, "text has a NUL character at position 2"),
    ("text", {"text": "ab\ud83d"}, r"half of a surrogate pair \(U\+D83D\) at position 3"),
    ("text", {"text": b"ab"}, "text must be text, not a bytes"),
    ("text", {"text": True}, "text must be text, not true"),
]


@pytest.mark.parametrize(("shape", "row", "reason"), BAD)
def test_bad_rows_are_refused_with_the_reason(shape: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        convert_row(shape, row)


def test_fingerprints_tell_rows_apart_and_openings_group_them() -> None:
    a = Conversation((USER, ASSISTANT))
    b = Conversation((Turn("user", "qa"), Turn("assistant", "")))
    c = Conversation((Turn("system", "s"), USER, Turn("assistant", "other")))
    assert len({fingerprint(row) for row in (a, b, c, PlainText("q"), Labelled("q", "a"))}) == 5
    assert opening(a) == opening(c) != opening(b)
