"""Text of an answer while it is being decoded."""

from collections.abc import Callable, Collection

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode an answer, without control tokens and without moving spaces."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one sequence gives one string
    return text


class TextPieces:
    """A streamer for ``model.generate``: passes on each piece of text that later tokens cannot change.

    The pieces together are what :func:`answer_text` gives for the whole answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, send: Callable[[str], None], stops: Collection[int]) -> None:
        self.tokenizer, self.send, self.stops = tokenizer, send, stops
        self.ids: list[int] = []
        self.sent = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt ``(1, time)`` first, then one token ``(1,)`` a step."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += [token for token in value.tolist() if token not in self.stops]
        text = answer_text(self.tokenizer, self.ids)
        # A character whose bytes are not all there yet decodes to the replacement sign.
        self._send(text.rstrip("\ufffd"))

    def end(self) -> None:
        """Send what was held back."""
        self._send(answer_text(self.tokenizer, self.ids))

    def _send(self, text: str) -> None:
        if len(text) > self.sent:
            self.send(text[self.sent :])
            self.sent = len(text)
