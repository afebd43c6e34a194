"""Text of an answer while it is being decoded."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode an answer, without control tokens and without moving spaces."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one sequence gives one string
    return text


class TextPieces:
    """Passes on each piece of an answer's text that later tokens cannot change.

    The pieces together are what :func:`answer_text` gives for the whole answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, send: Callable[[str], None]) -> None:
        self.tokenizer, self.send = tokenizer, send
        self.ids: list[int] = []
        self.sent = 0

    def add(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self.ids += ids
        # A character whose bytes are not all there yet decodes to the replacement sign.
        self._send(answer_text(self.tokenizer, self.ids).rstrip("\ufffd"))

    def end(self) -> None:
        """Send what was held back."""
        self._send(answer_text(self.tokenizer, self.ids))

    def _send(self, text: str) -> None:
        if len(text) > self.sent:
            self.send(text[self.sent :])
            self.sent = len(text)
