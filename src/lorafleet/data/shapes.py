"""The shapes that rows come in: told apart by their fields, turned into conversations, texts or labelled texts."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorafleet.data.conversation import BadRow, Conversation, Labelled, PlainText, Role, Row, Turn, clean_text, describe
from lorafleet.errors import DataError, did_you_mean

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Shape:
    """A known shape of rows.

    Attributes:
        fields: How the shape is shown to users.
        fits: True when the names of a row's fields are enough for this shape.
        convert: Turn a row into what is tokenized; raises BadRow with the reason.
    """

    fields: str
    fits: Callable[[set[str]], bool]
    convert: Callable[[Mapping[str, Any]], Row]


def detect_shape(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Name the shape that most of the rows fit, by their fields.

    Args:
        rows: Place and fields of some rows.

    Raises:
        DataError: No row fits any shape; the message lists the fields and the known shapes.
    """
    votes: Counter[str] = Counter()
    strangers: list[tuple[str, list[str]]] = []
    for source, row in rows:
        given = {name for name, value in row.items() if value is not None}
        fitting = next((name for name, shape in SHAPES.items() if shape.fits(given)), None)
        if fitting:
            votes[fitting] += 1
        else:
            strangers.append((source, [str(name) for name in row]))
    if votes:
        return votes.most_common(1)[0][0]
    source, names = strangers[0] if strangers else ("", [])
    raise DataError(
        f"rows with the fields {', '.join(map(repr, names[:20]))} ({source}) have no known shape. Known shapes:\n"
        + "\n".join(f"  {name:18}{shape.fields}" for name, shape in SHAPES.items())
        + f"\n{_renaming(names)}"
    )


def convert_row(shape: str, row: Mapping[str, Any]) -> Row:
    """Turn a row of the named shape into what is tokenized.

    Raises:
        BadRow: The row lacks the shape's fields, or one holds what cannot be used.
    """
    if not SHAPES[shape].fits(set(row)):
        names = ", ".join(repr(str(name)) for name in list(row)[:20])
        raise BadRow(f"wrong fields: {names}; a row of the shape {shape} has {SHAPES[shape].fields}")
    return SHAPES[shape].convert(row)


def _renaming(names: list[str]) -> str:
    """Name the nearest shape by what its fields are commonly called elsewhere."""
    for shape, wanted in _NEEDED.items():
        found: dict[str, str] = {}
        for field in wanted:
            free = [name for name in names if name not in found.values()]
            match = next((name for name in free if name.lower() in _COMMON_NAMES[field]), None)
            match = match or next((name for name in free if did_you_mean(name.lower(), [field])), None)
            if match is not None:
                found[field] = match
        if len(found) == len(wanted):
            renames = ", ".join(f"{name!r} to {field!r}" for field, name in found.items() if name != field)
            return f"Nearest is {shape}: rename {renames}."
    return "Rename the fields to one of these shapes."


def _messages(row: Mapping[str, Any]) -> Conversation:
    if row.get("tools"):
        raise BadRow("tools are not supported; leave out rows with tool calls")
    turns = _turns(row["messages"], "messages", ("role", "from"), ("content", "value"))
    return _conversation(row, turns)


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    if row.get("tools"):
        raise BadRow("tools are not supported; leave out rows with tool calls")
    turns = _turns(row["conversations"], "conversations", ("from", "role"), ("value", "content"))
    return _conversation(row, [*_system(row, turns), *turns])


def _prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion, references = row["prompt"], row.get("completion"), _references(row)
    if completion in (None, "") and references:
        completion = references[0]
    if isinstance(prompt, list):
        context = [Turn(turn.role, turn.content, trained=False) for turn in _message_list(prompt, "prompt")]
    else:
        context = [Turn("user", clean_text(prompt, "prompt"))]
    if isinstance(completion, list):
        answer = _message_list(completion, "completion")
    else:
        answer = [Turn("assistant", clean_text(completion, "completion"))]
    return _conversation(row, [*_system(row, context), *context, *answer])


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction = clean_text(row["instruction"], "instruction", may_be_empty=True)
    extra = clean_text(row.get("input"), "input", may_be_empty=True)
    question = "\n\n".join(part for part in (instruction, extra) if part.strip())
    clean_text(question, "instruction")
    references = _references(row)
    output = row.get("output")
    if output in (None, "") and references:
        output = references[0]
    history = [turn for pair in _history(row) for turn in pair]
    turns = [*history, Turn("user", question), Turn("assistant", clean_text(output, "output"))]
    return _conversation(row, [*_system(row, turns), *turns])


def _text_label(row: Mapping[str, Any]) -> Labelled:
    return Labelled(clean_text(row["text"], "text"), label_text(row["label"]))


def label_text(value: Any) -> str:
    """A label as text: whole numbers and booleans are written out, outer spaces dropped.

    Raises:
        BadRow: The label is empty, or of another type.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"label must be text or a whole number, not {describe(value)}")
    return clean_text(value, "label").strip()


def _text(row: Mapping[str, Any]) -> PlainText:
    return PlainText(clean_text(row["text"], "text"))


def _conversation(row: Mapping[str, Any], turns: list[Turn]) -> Conversation:
    if not any(turn.role == "assistant" and turn.trained for turn in turns):
        raise BadRow("there is no assistant turn to train")
    return Conversation(tuple(turns), _references(row), _answer(row))


def _turns(value: Any, where: str, role_keys: tuple[str, str], text_keys: tuple[str, str]) -> list[Turn]:
    value = _list_in_a_cell(value)
    if not isinstance(value, list | tuple):
        raise BadRow(f"{where} must be a list of turns, not {describe(value)}")
    if not value:
        raise BadRow(f"{where} is empty")
    turns = [_turn(item, f"{where}[{index}]", role_keys, text_keys) for index, item in enumerate(value)]
    # Exports write an empty system turn where there was none.
    return [turn for turn in turns if turn.role != "system" or turn.content.strip()]


def _message_list(value: list[Any], where: str) -> list[Turn]:
    return _turns(value, where, ("role", "from"), ("content", "value"))


def _turn(item: Any, where: str, role_keys: tuple[str, str], text_keys: tuple[str, str]) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRow(f"{where} must be an object with {role_keys[0]} and {text_keys[0]}, not {describe(item)}")
    role_key = next((key for key in role_keys if item.get(key) is not None), role_keys[0])
    text_key = next((key for key in text_keys if item.get(key) is not None), text_keys[0])
    if role_key not in item or (text_key not in item and not item.get("tool_calls")):
        missing = role_keys[0] if role_key not in item else text_keys[0]
        raise BadRow(f"{where} has no {missing!r}; its fields are {', '.join(map(repr, item)) or 'none'}")
    if item.get("tool_calls") or item.get("function_call"):
        raise BadRow(f"{where} calls a tool, which is not supported; leave out rows with tool calls")
    name = item[role_key]
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        hint = did_you_mean(name, _ROLES) if isinstance(name, str) else ""
        raise BadRow(f"{where}.{role_key} is {describe(name)}; roles are {', '.join(_ROLES)}{hint}")
    content = clean_text(_joined_parts(item[text_key]), f"{where}.{text_key}", may_be_empty=role == "system")
    return Turn(role, content, trained=item.get("weight") != 0)


def _joined_parts(content: Any) -> Any:
    """The text of a content in parts, as OpenAI's API writes it; anything else as it is."""
    if not (isinstance(content, list | tuple) and content and all(isinstance(part, Mapping) for part in content)):
        return content
    kinds = sorted({str(part.get("type")) for part in content} - {"text"})
    if kinds:
        raise BadRow(f"content has parts of the kind {', '.join(kinds)}; only text can be trained")
    return "".join(clean_text(part.get("text"), "a part of content", may_be_empty=True) for part in content)


def _list_in_a_cell(value: Any) -> Any:
    """A list that a CSV cell holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"a cell that starts like a list is broken JSON: {error}") from error
    return value


def _system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    content = clean_text(row.get("system"), "system", may_be_empty=True)
    if not content.strip():
        return []
    if turns and turns[0].role == "system":
        raise BadRow("there are two system texts: the field 'system' and the first turn; keep one")
    return [Turn("system", content)]


def _history(row: Mapping[str, Any]) -> Iterable[tuple[Turn, Turn]]:
    history = _list_in_a_cell(row.get("history"))
    if history is None or history == "":
        return
    if not isinstance(history, list | tuple):
        raise BadRow(f"history must be a list of [question, answer], not {describe(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{index}] must be [question, answer], not {describe(pair)}")
        question, answer = (clean_text(text, f"history[{index}][{side}]") for side, text in enumerate(pair))
        yield Turn("user", question), Turn("assistant", answer)


def _references(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("references")
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRow(f"references must be a list of texts, not {describe(value)}")
    return tuple(clean_text(text, f"references[{index}]") for index, text in enumerate(value))


def _answer(row: Mapping[str, Any]) -> str | None:
    value = row.get("answer")
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return clean_text(value, "answer").strip()


# In order: a row that fits several is of the first. Shapes with more context come before those with less.
SHAPES: dict[str, Shape] = {
    "messages": Shape('{"messages": [{"role", "content"}, …]}', lambda names: "messages" in names, _messages),
    "sharegpt": Shape('{"conversations": [{"from", "value"}, …]}', lambda names: "conversations" in names, _sharegpt),
    "alpaca": Shape(
        '{"instruction", "output"}, and "input", "system", "history" where there are',
        lambda names: "instruction" in names and bool(names & {"output", "references"}),
        _alpaca,
    ),
    "prompt_completion": Shape(
        '{"prompt", "completion"}',
        lambda names: "prompt" in names and bool(names & {"completion", "references"}),
        _prompt_completion,
    ),
    "text_label": Shape('{"text", "label"}', lambda names: {"text", "label"} <= names, _text_label),
    "text": Shape('{"text"}', lambda names: "text" in names, _text),
}

_NEEDED = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text_label": ("text", "label"),
    "text": ("text",),
}
_COMMON_NAMES = {
    "messages": {"messages", "conversation", "dialog", "dialogue", "chat", "turns"},
    "instruction": {"instruction"},
    "output": {"output", "response", "answer", "target"},
    "prompt": {"prompt", "question", "query", "input", "source", "inputs", "human", "user"},
    "completion": {"completion", "answer", "response", "output", "target", "targets", "chosen", "assistant", "reply"},
    "label": {"label", "labels", "category", "class", "sentiment", "intent", "topic", "target", "score"},
    "text": {"text", "sentence", "content", "review", "document", "body", "comment", "tweet"},
}
