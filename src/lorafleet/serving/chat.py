"""A conversation with a base and its adapters, any of which may answer the next turn."""

from collections.abc import Callable, Sequence
from typing import Any

from lorafleet.errors import ConfigError
from lorafleet.serving.pool import AdapterPool, Reply


class Chat:
    """A conversation. While one adapter answers, pieces of 64 tokens of what it has read are not read again.

    Args:
        pool: Who answers.
        adapter: A name, alias or folder; none for the pool's default.
        system_prompt: An adapter's own when not given.
        knobs: Those of :class:`~lorafleet.config.use.GenerationConfig`.

    Attributes:
        turns: The conversation so far, as ``{"role": …, "content": …}``.
    """

    def __init__(
        self, pool: AdapterPool, adapter: str | None = None, system_prompt: str | None = None, **knobs: Any
    ) -> None:
        self.pool, self.adapter, self.system_prompt, self.knobs = pool, adapter, system_prompt, knobs
        self.turns: list[dict[str, str]] = []

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> Reply:
        """Answer a turn of the user; both join the conversation when the answer is there.

        Where the conversation has become too long for the model, its oldest question and answer are left out.

        Raises:
            ConfigError: This turn alone is too long.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        while True:
            try:
                (reply,) = self.pool.generate(
                    [turns], self.adapter, system_prompt=self.system_prompt, on_text=on_text, **self.knobs
                )
                break
            except ConfigError:
                if len(turns) < 3:
                    raise
                turns = turns[2:]
        self.turns = [*turns, {"role": "assistant", "content": reply.text}]
        return reply

    def compare(self, names: Sequence[str], text: str | None = None) -> list[Reply]:
        """Let adapters answer the same turn, together; the conversation stays as it is.

        Args:
            names: The adapters; ``base`` for the base.
            text: The turn; the user's last one when not given.

        Raises:
            ConfigError: There is no turn yet.
        """
        if text is not None:
            turns = [*self.turns, {"role": "user", "content": text}]
        elif self.turns:
            turns = self.turns[:-1]
        else:
            raise ConfigError("nothing has been asked yet; ask first, or give the question: /compare A B TEXT")
        return self.pool.generate([turns] * len(names), names, system_prompt=self.system_prompt, **self.knobs)

    def switch(self, adapter: str | None) -> None:
        """Let another adapter answer from the next turn on.

        Raises:
            AdapterError: There is none, or it does not fit.
        """
        if adapter is not None and adapter != "base":
            before = self.pool.default
            self.pool.activate(adapter)  # that it can be used is known before a turn is lost
            self.pool.default = before
        self.adapter = adapter
