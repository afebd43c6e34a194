"""One prompt on its way to an answer."""

from collections.abc import Collection, Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from lorafleet.config.use import GenerationConfig
from lorafleet.generation.sampling import processors
from lorafleet.generation.streaming import TextPieces


class Request:
    """A prompt, how it is to be answered, and its answer so far.

    Args:
        prompt: Token ids.
        slot: Who answers; ``BASE_ONLY`` is the base.
        config: How long, how varied.
        key: Seed of its random numbers.
        stops: Tokens that end the answer.
        pieces: Gets the tokens as they come.
        owner: Who answers, by a name that no other adapter will have: what a row has read for one owner can serve the
            next prompt of the same; the slot where not given.

    Attributes:
        answer: New tokens, without the one that ended it.
        complete: Whether the model ended the answer; false where ``max_new_tokens`` cut it.
        done: Whether nothing more will come.
        error: Why there is no whole answer; also what the receiver of its text has raised.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        slot: int,
        config: GenerationConfig,
        key: int,
        stops: Collection[int],
        pieces: TextPieces | None = None,
        owner: Hashable = None,
    ) -> None:
        self.prompt, self.slot, self.config, self.stops, self.pieces = list(prompt), slot, config, stops, pieces
        self.key = key
        self.owner = slot if owner is None else owner
        self.greedy = config.temperature == 0 and config.repetition_penalty == 1
        self._processors = processors(config, [0], [key])
        self.answer: list[int] = []
        self.complete = self.done = False
        self.error: Exception | None = None

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer can have together."""
        return len(self.prompt) + self.config.max_new_tokens

    def choose(self, scores: Tensor) -> int:
        """The next token, for logits ``(vocabulary,)``.

        Raises:
            ModelError: The logits are not numbers.
        """
        ids = torch.tensor([self.prompt + self.answer], device=scores.device)
        return int(self._processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores[None])).argmax())

    def take(self, token: int) -> None:
        """Add the next token."""
        if token in self.stops:
            self.complete = self.done = True
        else:
            self.answer.append(token)
            self.done = len(self.answer) == self.config.max_new_tokens
            if self.pieces is not None:
                self.pieces.add([token])
        if self.done and self.pieces is not None:
            self.pieces.end()

    def fail(self, error: Exception) -> None:
        """Give up."""
        self.error, self.done = error, True
