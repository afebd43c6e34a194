"""Control tokens: which strings they are, and how text that contains such a string is tokenized as mere text.

Nearly all rows contain none and go through the model's own tokenizer untouched. A row that does contain one is
rendered with the string replaced by a placeholder, so that the template cannot act on it. Then the tokens that the
template wrote are renamed, the placeholders are turned back, and a copy of the tokenizer that knows its control tokens
only by their new names reads the whole text: the user's string matches nothing and becomes ordinary tokens.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lorafleet.data.conversation import BadRow, Role
from lorafleet.errors import ModelError

# Private-use code points around a renamed token and a placeholder's number. A row that has both a control string and
# one of these is refused, so they never meet.
_OPEN, _CLOSE = "\U000f10fa", "\U000f10fb"

_BYTE = re.compile("<0x[0-9A-F]{2}>")

Spans = Sequence[tuple[int, int]]


class Encoded(NamedTuple):
    """Token ids of one text, and where in the text each token came from: characters [start, end)."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class ControlTokens:
    """The control tokens of a tokenizer, and the encoding that keeps users' text from becoming one.

    A control token is any added token, but words and runs of white space that the tokenizer does not call special:
    those are vocabulary (indentation in Phi's and GPT-NeoX's tokenizers). In an assistant turn, tokens that are not
    special and that the chat template itself handles, such as ``<think>``, are part of the answer and stay tokens.

    Args:
        tokenizer: A fast tokenizer.
        template: Source of the chat template.

    Raises:
        ModelError: The tokenizer has no fast backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast backend, which is needed to find where an answer's tokens "
                "begin and end; use a model with a tokenizer.json"
            )
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        control = {token.content: i for i, token in added.items() if not _is_vocabulary(token.content, token.special)}
        self._ids = control
        self._names = sorted(control, key=len, reverse=True)
        self._any = _alternatives(self._names)
        special = {token.content for token in added.values() if token.special}
        self._in_answers = _alternatives([name for name in self._names if name in special or name not in template])
        self._unk = tokenizer.unk_token_id

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches any control token's string, the longest first."""
        return self._any

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset(self._ids.values())

    def id_of(self, name: str) -> int:
        """The id of a control token's string."""
        return self._ids[name]

    def occurs_in(self, text: str, role: Role) -> bool:
        """True when the text of such a turn contains a string that must not become a control token."""
        return (self._in_answers if role == "assistant" else self._any).search(text) is not None

    def hide(self, text: str, role: Role) -> str:
        """Replace control strings in a turn's text by placeholders.

        Raises:
            BadRow: The text contains the code points that placeholders are made of.
        """
        if _OPEN in text or _CLOSE in text:
            raise BadRow(
                f"a control string together with the reserved code points U+{ord(_OPEN):X} and U+{ord(_CLOSE):X}"
            )
        pattern = self._in_answers if role == "assistant" else self._any
        return pattern.sub(lambda found: f"{_OPEN}{self._ids[found[0]]}{_CLOSE}", text)

    def reveal(self, text: str, spans: Spans) -> tuple[str, list[tuple[int, int]]]:
        """Rename the template's control tokens, turn placeholders back, and move ``spans`` along.

        Args:
            text: A rendered text whose turns were hidden.
            spans: Character ranges in it.

        Returns:
            The text for ``encode_hidden``, and the same ranges in it.
        """
        shifts: list[tuple[int, int]] = []
        name_of = {str(i): name for name, i in self._ids.items()}
        total = 0

        def replace(found: re.Match[str]) -> str:
            nonlocal total
            new = name_of[found[1]] if found[1] else f"{_OPEN}{found[0]}{_CLOSE}"
            total += len(new) - len(found[0])
            shifts.append((found.start(), total))
            return new

        revealed = re.sub(f"{_OPEN}([0-9]+){_CLOSE}|{self._any.pattern}", replace, text)
        starts = np.array([start for start, _ in shifts], dtype=np.int64)

        def move(at: int) -> int:
            before = int(np.searchsorted(starts, at, side="left"))
            return at + (shifts[before - 1][1] if before else 0)

        return revealed, [(move(start), move(end)) for start, end in spans]

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize rendered texts exactly as the model's tokenizer does."""
        self._reset()
        return [_encoded(encoding) for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_hidden(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize texts from ``reveal``: only renamed tokens become control tokens.

        Raises:
            BadRow: The tokenizer's vocabulary itself turns a control string into its token.
        """
        copy, original_ids = self._renamed
        results = []
        for text, encoding in zip(texts, copy.encode_batch(list(texts), add_special_tokens=False), strict=True):
            encoded = _encoded(encoding)
            ids = original_ids[encoded.ids]
            written = re.findall(f"{_OPEN}([^{_CLOSE}]+){_CLOSE}", text)
            if self._count(ids) != sum(1 for name in written if self._ids[name] != self._unk):
                raise BadRow("a control string in the text cannot be kept as text by this model's tokenizer")
            results.append(Encoded(ids, encoded.starts, encoded.ends))
        return results

    def only_written(self, text: str, ids: NDArray[np.int32]) -> bool:
        """True when the ids hold no more control tokens than there are control strings in the rendered text.

        More appear where the tokenizer's normalizer turns other characters (such as full-width ones) into one.
        """
        found = self._any.findall(text)
        return self._count(ids) == sum(1 for name in found if self._ids[name] != self._unk)

    def _count(self, ids: NDArray[np.int32]) -> int:
        return int(self._is_control[ids].sum())

    @cached_property
    def _is_control(self) -> NDArray[np.bool_]:
        table = np.zeros(max(self._backend.get_vocab().values()) + 1, dtype=bool)
        table[[i for i in self._ids.values() if i != self._unk]] = True
        return table

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, NDArray[np.int32]]:
        """A copy of the tokenizer with renamed control tokens, and the original id of each of its ids."""
        self._reset()
        rules = json.loads(self._backend.to_str())
        names = []
        for token in rules["added_tokens"]:
            name = token["content"]
            if name in self._ids:
                token["content"] = f"{_OPEN}{name}{_CLOSE}"
            names.append((token["content"], token["id"]))
        copy = Tokenizer.from_str(json.dumps(rules))
        copy.encode_special_tokens = False
        copied = copy.get_vocab()
        table = np.arange(max(copied.values()) + 1, dtype=np.int32)
        for name, original in names:
            table[copied[name]] = original
        return copy, table

    def _reset(self) -> None:
        """Undo what an earlier call of the tokenizer may have left in its backend."""
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False


def _is_vocabulary(token: str, special: bool) -> bool:
    """True for words and white space that are not special, and for bytes, which stand for unknown characters."""
    is_word = all(char.isalnum() or char.isspace() or char == "▁" for char in token)
    return (is_word and not special) or _BYTE.fullmatch(token) is not None


def _alternatives(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _encoded(encoding: object) -> Encoded:
    ids = np.array(encoding.ids, dtype=np.int32)  # type: ignore[attr-defined]
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # type: ignore[attr-defined]
    return Encoded(ids, offsets[:, 0], offsets[:, 1])
