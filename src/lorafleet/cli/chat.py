"""``lorafleet chat``: a conversation in the terminal, or with lines from a file, with any adapter of the registry."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorafleet.config import (
    AdapterConfig,
    ChatConfig,
    GenerationConfig,
    ModelConfig,
    PoolConfig,
    RegistryConfig,
    load_sections,
)
from lorafleet.errors import ConfigError, LorafleetError

if TYPE_CHECKING:
    from lorafleet.serving.chat import Chat
    from lorafleet.serving.pool import Reply

HELP = """\
/adapter NAME       let an adapter of the registry (NAME, NAME:3, NAME@prod) or a folder answer; base is the bare base
/compare A B [TEXT] let two answer TEXT, or the last question, side by side
/system TEXT        set the system prompt and begin anew
/reset              begin anew
/quit               end; Ctrl-D does it too, and Ctrl-C stops an answer"""


@dataclass
class ChatResult:
    """A chat that has ended.

    Attributes:
        model: The base.
        turns: What was asked and answered, in order, with who answered; of comparisons all answers.
    """

    model: str
    turns: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def chat(
    config: Mapping[str, Any] | str | Path | None = None,
    /,
    *,
    on_text: Callable[[str], None] | None = None,
    **knobs: Any,
) -> ChatResult:
    """Talk with a base and its adapters on the terminal, a line a turn; commands begin with a slash.

    Args:
        config: A YAML file, or a mapping of knobs.
        on_text: Called with each piece of an answer as it comes; none prints nothing.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are unknown or out of range.
        AdapterError: The adapter cannot be used.
        ModelError: The base cannot be loaded.
    """
    from lorafleet.serving.chat import Chat
    from lorafleet.serving.open import open_pool

    sections = (ModelConfig, AdapterConfig, RegistryConfig, ChatConfig, GenerationConfig, PoolConfig)
    model, adapter, registry, begin, settings, size = load_sections(sections, config, knobs)
    pool = open_pool(model, adapter, registry, size)
    talk = Chat(pool, adapter.adapter, begin.system_prompt, **settings.model_dump())
    result = ChatResult(pool.base.name)
    _say(f"{pool.base.name}, {adapter.adapter or 'base'}. /help shows the commands.", on_text)
    for line in _lines(on_text):
        try:
            if not _obey(line, talk, result, on_text):
                break
        except (LorafleetError, KeyboardInterrupt) as error:
            if not sys.stdin.isatty():
                raise
            click.echo(f"error: {error}" if isinstance(error, LorafleetError) else " stopped", err=True)
    return result


def _lines(on_text: Callable[[str], None] | None) -> Any:
    """Lines of the terminal, edited with its history, or of standard input."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() edits lines with it
    while True:
        try:
            # Python's line editor works on the real stdout only.
            with contextlib.redirect_stdout(sys.__stdout__) if terminal else contextlib.nullcontext():
                line = input("> " if terminal else "")
        except EOFError:
            _say("", on_text)
            return
        except KeyboardInterrupt:
            _say("", on_text)
            continue
        if line.strip():
            yield line.strip()


def _obey(line: str, talk: "Chat", result: ChatResult, on_text: Callable[[str], None] | None) -> bool:
    """Do what a line asks for; false at the end."""
    if not line.startswith("/"):
        _record(result, line, [talk.say(line, on_text)])
        _say("", on_text)
        return True
    word, _, rest = line[1:].partition(" ")
    match word:
        case "quit" | "exit":
            return False
        case "adapter" if rest.strip():
            talk.switch(rest.strip())
        case "adapter":
            _say(f"{talk.adapter or 'base'} answers", on_text)
        case "compare":
            names, text = _compared(rest)
            question = text or (talk.turns[-2]["content"] if talk.turns else "")
            replies = talk.compare(names, text)
            _record(result, question, replies)
            if on_text is not None:
                on_text(_beside(names, replies))
        case "system":
            talk.system_prompt, talk.turns = rest.strip() or None, []
        case "reset":
            talk.turns = []
        case "help":
            _say(HELP, on_text)
        case _:
            raise ConfigError(f"there is no command /{word}; /help shows them")
    return True


def _compared(rest: str) -> tuple[list[str], str | None]:
    """The two names, quoted as in a shell where they have spaces, and the text behind them as it is."""
    line = StringIO(rest)
    words = shlex.shlex(line, posix=True)
    words.whitespace_split, words.commenters = True, ""
    try:
        names = [word for _ in range(2) if (word := words.get_token()) is not None]
    except ValueError as error:
        remedy = "put a name with a space or a quotation mark in quotes"
        raise ConfigError(f"/compare {rest}: {error}; {remedy}") from error
    if len(names) < 2:
        raise ConfigError("/compare takes two adapters: /compare A B, or /compare A B TEXT; base is the bare base")
    return names, line.read().strip() or None


def _record(result: ChatResult, question: str, replies: "list[Reply]") -> None:
    result.turns.append({"question": question, "answers": [asdict(reply) for reply in replies]})


def _say(text: str, on_text: Callable[[str], None] | None) -> None:
    if on_text is not None:
        on_text(text + "\n")


def _beside(names: list[str], replies: "list[Reply]") -> str:
    """A table of a column for each answer."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, padding=(0, 1))
    for name, reply in zip(names, replies, strict=True):
        label = reply.adapter or "base"
        table.add_column(Text(name if name == label else f"{name} ({label})"), ratio=1)
    table.add_row(*(Text(reply.text) for reply in replies))
    console = Console(file=sys.__stdout__)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
