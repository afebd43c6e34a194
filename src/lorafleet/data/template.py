"""The chat template: which one, rendering it, and what it can do."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lorafleet.data.control import ControlTokens
from lorafleet.data.conversation import BadRow, Turn
from lorafleet.errors import ConfigError

PLAIN_TEMPLATE = Path(__file__).parent / "plain.jinja"

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template's own code can raise; it is somebody else's program.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError)

Spans = list[tuple[int, int]]


class ChatTemplate:
    """A chat template with the special tokens it may write.

    Args:
        tokenizer: Whose template is used, unless ``path`` names another.
        path: A Jinja file.

    Attributes:
        source: The Jinja text.
        name: ``model``, ``plain`` (the fallback, ``plain.jinja``) or the file's path.

    Raises:
        ConfigError: The file cannot be read, or the template cannot render a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> None:
        self.source, self.name = _choose(tokenizer, path)
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.has_markers = _MARKER.search(self.source) is not None
        self._in_parts = self._find_content_form()

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        """The text of the turns, as ``apply_chat_template`` renders it.

        Raises:
            BadRow: The template refuses the turns.
        """
        return self._render(turns, add_generation_prompt, marked=False)[0]

    def render_marked(self, turns: Sequence[Turn]) -> tuple[str, Spans]:
        """The text, and the character ranges inside the template's generation markers.

        Raises:
            BadRow: The template refuses the turns.
        """
        return self._render(turns, False, marked=True)

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool, *, marked: bool) -> tuple[str, Spans]:
        try:
            texts, ranges = self._run(
                self._acceptable(turns),
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marked,
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRow(f"the chat template refuses the turns: {_reason(error)}") from error
        return str(texts[0]), list(ranges[0]) if marked else []

    def _acceptable(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns, with a system text put before the first question where the template has no system role."""
        if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "user" or self.has_system_role:
            return turns
        first = Turn("user", f"{turns[0].content}\n\n{turns[1].content}")
        return [first, *turns[2:]]

    @cached_property
    def has_system_role(self) -> bool:
        """False for templates such as Gemma's that refuse a system turn, or leave it out."""
        try:
            return "Sy5tem" in self._run([Turn("system", "Sy5tem"), Turn("user", "Question")])[0][0]
        except _TEMPLATE_ERRORS:
            return False

    def _find_content_form(self) -> bool:
        """Whether a turn holds text (False) or, for models that also see images, a list of parts (True)."""
        reason = "it leaves out the text of turns"
        for self._in_parts in (False, True):
            try:
                text = self._run([Turn("user", "Que5tion"), Turn("assistant", "An5wer")])[0][0]
            except _TEMPLATE_ERRORS as error:
                reason = f"it refuses a question with its answer: {_reason(error)}"
                continue
            if "Que5tion" in text and "An5wer" in text:
                return self._in_parts
        raise ConfigError(f"the chat template ({self.name}) cannot be used: {reason}")

    def _run(self, turns: Sequence[Turn], **options: Any) -> Any:
        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.content}] if self._in_parts else turn.content}
            for turn in turns
        ]
        return render_jinja_template(conversations=[messages], chat_template=self.source, **options, **self._special)

    def end_of_turn(self, control: ControlTokens) -> str | None:
        """The control token that the template writes after an answer; None when it writes none."""
        answer = "An5wer"
        text = self.render([Turn("user", "Question"), Turn("assistant", answer)])
        found = control.pattern.search(text, text.rfind(answer) + len(answer))
        return found[0] if found else None


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _choose(tokenizer: PreTrainedTokenizerBase, path: str | None) -> tuple[str, str]:
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8"), path
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template = {path!r} cannot be read: {error}") from error
    if tokenizer.chat_template is None:
        return PLAIN_TEMPLATE.read_text(encoding="utf-8"), "plain"
    try:
        return tokenizer.get_chat_template(), "model"
    except ValueError as error:  # several named templates, none of them called default
        raise ConfigError(f"{error}. Name a Jinja file with chat_template") from error
