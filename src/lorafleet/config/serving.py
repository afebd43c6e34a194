"""The knobs of a base that serves many adapters."""

from lorafleet.config.knob import Section, knob


class PoolConfig(Section):
    """How many adapters and requests at a time."""

    max_adapters: int = knob(8, "Adapters kept in memory; beyond them the one unused for longest leaves.", ge=1)
    max_requests: int = knob(8, "Requests answered at a time; the others wait.", ge=1)


class ChatConfig(Section):
    """What a chat begins with."""

    system_prompt: str | None = knob(None, "System turn; that of the adapter's training when not given.")
