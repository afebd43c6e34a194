"""Conversations and texts to token ids and loss masks, in batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorafleet.config.data import DataConfig
from lorafleet.data.control import ControlTokens, Encoded
from lorafleet.data.conversation import BadRow, Conversation, PlainText, Turn
from lorafleet.data.masks import Answer, render_with_answers
from lorafleet.data.template import ChatTemplate
from lorafleet.data.truncation import TooLong, shorten


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on. A conversation gives one, or one for each answer (see ``masks``).

    Attributes:
        ids: Token ids ``(tokens,)``.
        mask: True for tokens that are predicted; the first token never is ``(tokens,)``.
        answer: Tokens [start, end) of the last answer that is left; (0, 0) for plain text.
        reference: The text of that answer; empty for plain text.
        references: Other texts that are as good.
        final: The short final answer to compare with, where the row has one.
        strategy: How the answers were found: markers, prefix, per-turn, or text.
        truncated: Tokens were cut off or out.
        neutralised: The text has a control token's string, which was kept as text.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    answer: tuple[int, int]
    reference: str
    references: tuple[str, ...] = ()
    final: str | None = None
    strategy: str = "text"
    truncated: bool = False
    neutralised: bool = False


class _Draft(NamedTuple):
    """A text to tokenize, and what is known about it before that."""

    row: int
    text: str
    answers: list[Answer]
    strategy: str
    hidden: bool


class _Tokenized(NamedTuple):
    """A draft's tokens. For each answer: its first trained token, where generation begins, past its last token."""

    ids: NDArray[np.int32]
    answers: list[tuple[int, int, int]]
    hidden: bool


class ChatEncoder:
    """Encodes rows with a model's chat template and tokenizer.

    Args:
        tokenizer: The base model's, with a fast backend.
        config: Whose ``chat_template``, ``system_prompt``, ``loss_on`` and ``max_length`` count; defaults when None.

    Attributes:
        template: The chat template in use.
        end_of_turn: The token that ends an answer: what the template writes there, or else the end-of-text token, which
            is then added after a row's last answer.
        stop_ids: Tokens at which generation has to stop.
        warnings: What a user should know about this template.

    Raises:
        ConfigError: The chat template cannot be read or used.
        ModelError: The tokenizer has no fast backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None) -> None:
        self._config = config or DataConfig(data="")
        self.template = ChatTemplate(tokenizer, self._config.chat_template)
        self._control = ControlTokens(tokenizer, self.template.source)
        self._written_end = self.template.end_of_turn(self._control)
        self._eos: int = tokenizer.eos_token_id
        self.end_of_turn: str = self._written_end or tokenizer.eos_token
        end_id = self._control.id_of(self._written_end) if self._written_end else self._eos
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([end_id, self._eos]))
        self.warnings = self._find_warnings(tokenizer)
        self._around = _tokens_around(tokenizer)

    def encode(self, row: Conversation | PlainText) -> list[Sample]:
        """Encode one row.

        Raises:
            BadRow: The row cannot be rendered, or nothing of it would be trained.
        """
        result = self.encode_rows([row])[0]
        if isinstance(result, BadRow):
            raise result
        return result

    def encode_rows(self, rows: Sequence[Conversation | PlainText]) -> list[list[Sample] | BadRow]:
        """Encode many rows at once: for each its samples, or why it cannot be used."""
        drafts: list[_Draft] = []
        faults: dict[int, BadRow] = {}
        for number, row in enumerate(rows):
            try:
                drafts += self._draft_text(number, row) if isinstance(row, PlainText) else self._draft_chat(number, row)
            except BadRow as fault:
                faults[number] = fault
        samples: dict[int, list[Sample]] = {}
        too_long: dict[int, TooLong] = {}
        for draft, tokens in zip(drafts, self._tokenize(drafts), strict=True):
            if draft.row in faults:
                continue
            try:
                if isinstance(tokens, BadRow):
                    raise tokens
                sample = self._sample(rows[draft.row], draft, tokens)
                samples.setdefault(draft.row, []).append(sample)
            except TooLong as fault:
                too_long[draft.row] = fault
            except BadRow as fault:
                faults[draft.row] = fault
        for number, reason in too_long.items():
            if number in samples:  # other answers of the row are left
                samples[number][-1] = replace(samples[number][-1], truncated=True)
            else:
                faults.setdefault(number, reason)
        return [faults[number] if number in faults else samples[number] for number in range(len(rows))]

    def prompt_ids(self, turns: Sequence[Turn | Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation up to where the model's answer begins.

        Args:
            turns: Turns, or objects with ``role`` and ``content``; the last one is not the assistant's.

        Raises:
            BadRow: The template refuses the turns.
        """
        plain = [turn if isinstance(turn, Turn) else Turn(turn["role"], turn["content"]) for turn in turns]
        shown, hidden = self._hide(self._with_system(plain))
        text = self.template.render(shown, add_generation_prompt=True)
        tokens = self._tokenize([_Draft(0, text, [], "", hidden)])[0]
        if isinstance(tokens, BadRow):
            raise tokens
        return [int(i) for i in tokens.ids]

    def answer_ids(self, answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokens of short answers as they stand after a prompt, each with its end-of-turn token.

        Raises:
            BadRow: The template refuses such an answer.
        """
        found = []
        for answer in answers:
            row = Conversation((Turn("user", "Question"), Turn("assistant", answer)))
            draft = self._draft_chat(0, row)[-1]
            tokens = self._tokenize([draft])[0]
            if isinstance(tokens, BadRow):
                raise tokens
            sample = self._whole_sample(row, draft, tokens)
            found.append(tuple(int(i) for i in sample.ids[slice(*sample.answer)]))
        return tuple(found)

    def _draft_text(self, number: int, row: PlainText) -> list[_Draft]:
        hidden = self._control.occurs_in(row.text, "user")
        text = self._control.hide(row.text, "user") if hidden else row.text
        return [_Draft(number, text, [], "text", hidden)]

    def _draft_chat(self, number: int, row: Conversation) -> list[_Draft]:
        turns = self._with_system(row.turns)
        answers = [k for k, turn in enumerate(turns) if turn.role == "assistant" and k > 0]
        if not answers:
            raise BadRow("there is no assistant turn after another turn, so there is no answer to train")
        if self._config.loss_on == "all":
            wanted = answers[-1:]
        else:
            turns = turns[: answers[-1] + 1]  # turns after the last answer would only be read
            trained = [k for k in answers if turns[k].trained]
            wanted = trained[-1:] if self._config.loss_on == "completion" else trained
        if not wanted:
            raise BadRow("no assistant turn is trained: all of them have weight 0 or open the conversation")
        turns, hidden = self._hide(turns)
        rendered = render_with_answers(self.template, turns, wanted, self._written_end)
        return [_Draft(number, text, spans, strategy, hidden) for text, spans, strategy in rendered]

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        has_system = any(turn.role == "system" for turn in turns)
        if self._config.system_prompt and not has_system:
            return [Turn("system", self._config.system_prompt), *turns]
        return list(turns)

    def _hide(self, turns: list[Turn]) -> tuple[list[Turn], bool]:
        """Replace control strings in the turns by placeholders, when there are any."""
        if not any(self._control.occurs_in(turn.content, turn.role) for turn in turns):
            return turns, False
        return [replace(turn, content=self._control.hide(turn.content, turn.role)) for turn in turns], True

    def _tokenize(self, drafts: Sequence[_Draft]) -> list[_Tokenized | BadRow]:
        """Tokenize texts, those with hidden control strings by the renamed tokenizer."""
        fast = [number for number, draft in enumerate(drafts) if not draft.hidden]
        results: dict[int, _Tokenized | BadRow] = {}
        for number, encoded in zip(fast, self._control.encode([drafts[n].text for n in fast]), strict=True):
            if self._control.only_written(drafts[number].text, encoded.ids):
                results[number] = self._with_answers(drafts[number], encoded, _characters(drafts[number]), False)
        for number, draft in enumerate(drafts):
            if number not in results:
                text, moved = self._control.reveal(draft.text, _characters(draft))
                try:
                    results[number] = self._with_answers(draft, self._control.encode_hidden([text])[0], moved, True)
                except BadRow as fault:
                    results[number] = fault
        return [results[number] for number in range(len(drafts))]

    def _with_answers(
        self, draft: _Draft, encoded: Encoded, characters: list[tuple[int, int]], hidden: bool
    ) -> _Tokenized:
        ranges = [_tokens_of(encoded, *span) for span in characters]
        answers = [(start, begins, end) for (start, end), (begins, _) in zip(ranges[::2], ranges[1::2], strict=True)]
        ids = encoded.ids
        if self._written_end is None and draft.answers and draft.answers[-1].end == len(draft.text):
            ids = np.append(ids, np.int32(self._eos))
            answers[-1] = (*answers[-1][:2], len(ids))
        return _Tokenized(ids, answers, hidden)

    def _sample(self, row: Conversation | PlainText, draft: _Draft, tokens: _Tokenized) -> Sample:
        sample = self._whole_sample(row, draft, tokens)
        if not sample.mask.any():
            raise BadRow("no token would be trained")
        if len(sample.ids) <= self._config.max_length:
            return sample
        return self._shortened(sample, row, draft, tokens)

    def _whole_sample(self, row: Conversation | PlainText, draft: _Draft, tokens: _Tokenized) -> Sample:
        if isinstance(row, PlainText):
            before, after = self._around
            ids = np.concatenate([before, tokens.ids, after if len(after) else np.array([self._eos], dtype=np.int32)])
            mask = np.ones(len(ids), dtype=bool)
            mask[0] = False
            return Sample(ids, mask, (0, 0), "", neutralised=tokens.hidden)
        mask = np.full(len(tokens.ids), self._config.loss_on == "all")
        for start, _, end in tokens.answers:
            mask[start:end] = True
        mask[0] = False
        sample = Sample(tokens.ids, mask, tokens.answers[-1][1:], "", neutralised=tokens.hidden)
        return self._described(sample, row, draft, len(tokens.answers) - 1)

    def _described(self, sample: Sample, row: Conversation, draft: _Draft, which: int) -> Sample:
        """Add what belongs to the answer that is the sample's last one."""
        turns = self._with_system(row.turns)
        number = draft.answers[which].turn
        is_last = not any(turn.role == "assistant" for turn in turns[number + 1 :])
        return replace(
            sample,
            reference=turns[number].content,
            references=row.references if is_last else (),
            final=row.answer if is_last else None,
            strategy=draft.strategy,
        )

    def _shortened(self, sample: Sample, row: Conversation | PlainText, draft: _Draft, tokens: _Tokenized) -> Sample:
        is_control = np.isin(sample.ids, list(self._control.ids))
        first = tokens.answers[0][1:] if tokens.answers else (0, 0)
        kept = shorten(sample.mask, first, is_control, self._config.max_length)
        mask = sample.mask[kept]
        mask[0] = False
        short = replace(sample, ids=sample.ids[kept], mask=mask, truncated=True)
        if isinstance(row, PlainText):
            return short
        left = [
            (int(begins), int(end)) for _, begins, end in (np.searchsorted(kept, answer) for answer in tokens.answers)
        ]
        which = max((k for k, (begins, end) in enumerate(left) if end > begins), default=0)
        return self._described(replace(short, answer=left[which]), row, draft, which)

    def _find_warnings(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        warnings = []
        if self._written_end is None:
            warnings.append(
                f"the chat template ends answers with no control token; {tokenizer.eos_token} is added after the last "
                "answer of each row, or the model would never learn to stop"
            )
        elif self._written_end != tokenizer.eos_token:
            warnings.append(
                f"the chat template ends answers with {self._written_end}, while the tokenizer's end-of-text token is "
                f"{tokenizer.eos_token}; whatever serves the adapter has to stop at both"
            )
        question = [Turn("user", "Question")]
        prompt = self.template.render(question, add_generation_prompt=True)
        whole = self.template.render([*question, Turn("assistant", "answer")])
        before, both = (encoded.ids.tolist() for encoded in self._control.encode([prompt, whole]))
        if not whole.startswith(prompt):
            warnings.append(
                f"the chat template's generation prompt ends with {prompt[-20:]!r}, which it does not write before a "
                "given answer; the adapter learns answers without it"
            )
        elif both[: len(before)] != before:
            warnings.append(
                f"the end of the chat template's generation prompt, {prompt[-20:]!r}, is tokenized together with the "
                "answer's start; when generating, where the answer is not yet there, the tokens differ from training"
            )
        return warnings


def _characters(draft: _Draft) -> list[tuple[int, int]]:
    """For each answer two ranges: what is trained of it, and what is generated of it."""
    return [span for answer in draft.answers for span in ((answer.start, answer.end), (answer.begins, answer.end))]


def _tokens_of(encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """Tokens [first, past the last) that overlap the characters [start, end)."""
    # A tokenizer may trim the space off a token's range; a token begins where the one before ends.
    begins = np.minimum(encoded.starts, np.concatenate([[0], encoded.ends[:-1]]))
    first = int(np.searchsorted(encoded.ends, start, side="right"))
    return first, max(first, int(np.searchsorted(begins, end, side="left")))


def _tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The special tokens that the tokenizer puts before and after plain text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return np.array(whole[:at], dtype=np.int32), np.array(whole[at + len(bare) :], dtype=np.int32)
