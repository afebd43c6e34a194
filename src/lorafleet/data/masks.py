"""Where the answers are in a rendered conversation, found in one of three ways.

1. markers: the template marks answers itself, with ``{% generation %}``.
2. prefix: the conversation up to an answer, with the generation prompt, is a prefix of the whole; the answer begins
   where that prefix ends.
3. per-turn: for templates that render earlier answers otherwise than the last one (Qwen3 leaves out their thinking),
   every answer is rendered as the last turn of its own sample, and found there by its prefix.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lorafleet.data.conversation import BadRow, Turn
from lorafleet.data.template import ChatTemplate

Strategy = Literal["markers", "prefix", "per-turn"]


class Answer(NamedTuple):
    """One assistant turn in a rendered text.

    Attributes:
        turn: Its number in the conversation.
        start: Its first trained character.
        end: Past its last trained character.
        begins: Where generation begins: ``start``, or later where a template's markers enclose the generation prompt.
    """

    turn: int
    start: int
    end: int
    begins: int


class Rendered(NamedTuple):
    """A rendered conversation, or its beginning up to one answer."""

    text: str
    answers: list[Answer]
    strategy: Strategy


def render_with_answers(
    template: ChatTemplate, turns: Sequence[Turn], wanted: Sequence[int], end_of_turn: str | None
) -> list[Rendered]:
    """Render a conversation and find its answers.

    Args:
        template: The chat template.
        turns: The conversation.
        wanted: Numbers of the assistant turns to find, in order; none of them opens the conversation.
        end_of_turn: The token that ends an answer; it belongs to the answer, what stands behind it does not.

    Returns:
        One text that holds all wanted answers, or one text for each of them.

    Raises:
        BadRow: The template refuses the turns, or an answer cannot be found in what it wrote.
    """
    if template.has_markers:
        text, ranges = template.render_marked(turns)
        speakers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        if len(ranges) == len(speakers):  # else it marks only some turns, or parts of them
            found = dict(zip(speakers, ranges, strict=True))
            return [
                Rendered(text, [_marked(template, turns, k, text, found[k], end_of_turn) for k in wanted], "markers")
            ]
    text = template.render(turns)
    found_all = [_find_answer(template, turns, k, text, end_of_turn) for k in wanted]
    answers = [answer for answer in found_all if answer is not None]
    if len(answers) == len(wanted):
        return [Rendered(text, answers, "prefix")]
    return [_render_alone(template, turns[: k + 1], k, end_of_turn) for k in wanted]


def _find_answer(
    template: ChatTemplate, turns: Sequence[Turn], k: int, whole: str, end_of_turn: str | None
) -> Answer | None:
    """Answer ``k``, if the text of the turns up to it is, up to the answer's end, a prefix of the whole text."""
    prompt = template.render(turns[:k], add_generation_prompt=True)
    text = whole if k == len(turns) - 1 else template.render(turns[: k + 1])
    end = _cut_at_end(text, len(prompt), end_of_turn)
    stable = text.startswith(prompt) and whole.startswith(text[:end]) and end > len(prompt)
    return Answer(k, len(prompt), end, len(prompt)) if stable else None


def _render_alone(template: ChatTemplate, beginning: Sequence[Turn], k: int, end_of_turn: str | None) -> Rendered:
    text = template.render(beginning)
    prompt = template.render(beginning[:-1], add_generation_prompt=True)
    start = len(prompt)
    if not text.startswith(prompt):
        # Some generation prompts open the thinking (DeepSeek-R1), which a stored answer does not continue.
        start = next(i for i in range(len(prompt)) if not text.startswith(prompt[: i + 1]))
        if not text.startswith(template.render(beginning[:-1])):
            raise BadRow(
                f"the chat template changes the turns before answer {k + 1} once that is there; cannot find it"
            )
    end = _cut_at_end(text, start, end_of_turn)
    if end <= start:
        raise BadRow(f"the chat template leaves out the answer in turn {k + 1}")
    return Rendered(text, [Answer(k, start, end, start)], "per-turn")


def _cut_at_end(text: str, start: int, end_of_turn: str | None) -> int:
    """Where the answer that begins at ``start`` and ends the text stops being trained."""
    if end_of_turn is None:
        return len(text)
    at = text.rfind(end_of_turn, start)
    return len(text) if at < 0 else at + len(end_of_turn)


def _marked(
    template: ChatTemplate, turns: Sequence[Turn], k: int, text: str, marked: tuple[int, int], end_of_turn: str | None
) -> Answer:
    start, end = marked[0], _with_end(text, marked[1], end_of_turn)
    prompt = template.render(turns[:k], add_generation_prompt=True)
    encloses_prompt = text.startswith(prompt) and start < len(prompt) < end
    return Answer(k, start, end, len(prompt) if encloses_prompt else start)


def _with_end(text: str, end: int, end_of_turn: str | None) -> int:
    """Extend a marked answer over the end-of-turn token when the template's markers stop just before it."""
    if end_of_turn is None or text[:end].endswith(end_of_turn):
        return end
    found = re.compile(rf"\s*{re.escape(end_of_turn)}").match(text, end)
    return found.end() if found else end
