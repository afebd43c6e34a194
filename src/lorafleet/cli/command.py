"""A command: its words, its sections, the library function it calls, and how its result is shown."""

import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import click

from lorafleet.cli.flags import Flag, flags_of, given_knobs, options_of
from lorafleet.cli.help import Argument, help_text
from lorafleet.cli.output import print_json, reporting
from lorafleet.config import Section

CONFIG = Argument("CONFIG", False, "A YAML file with any of the knobs below (learning_rate: 1e-4); flags override it.")


@dataclass(frozen=True)
class Command:
    """One command: ``lorafleet <name> [ARGUMENT] --flags``.

    It calls ``<home>.<verb>(argument, **knobs)`` and prints what comes back with ``<view>.<verb>``.

    Attributes:
        name: The word on the command line.
        verb: The function.
        summary: One line for the help.
        sections: Where its flags come from; the same that the verb reads.
        argument: What stands before the flags.
        defaults: Defaults that differ from the declared ones.
        home: The module of the function; the package itself for the public ones.
        view: The module that shows its result.
        streams: Whether the verb takes ``on_text`` and its text is printed as it comes.
        examples: Command lines for the help.
    """

    name: str
    verb: str
    summary: str
    sections: tuple[type[Section], ...] = ()
    argument: Argument | None = CONFIG
    defaults: Mapping[str, Any] = field(default_factory=dict)
    home: str = "lorafleet"
    view: str = "lorafleet.cli.show"
    streams: bool = False
    examples: tuple[str, ...] = ()

    @property
    def flags(self) -> list[Flag]:
        """The flags of its sections, less the knob that the argument gives."""
        given = [self.argument.knob] if self.argument and self.argument.knob else []
        return flags_of(self.sections, given, self.defaults)

    @property
    def function(self) -> Callable[..., Any]:
        """What the command calls; looked up late, because it imports torch."""
        found: Callable[..., Any] = getattr(import_module(self.home), self.verb)
        return found


def click_command(command: Command, parents: str = "lorafleet") -> click.Command:
    """The command as click runs it."""
    flags = command.flags
    path = f"{parents} {command.name}"

    def print_help(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            click.echo(help_text(path, command.summary, command.argument, flags, command.examples), nl=False)
            context.exit()

    def run(**values: Any) -> None:
        context = click.get_current_context()
        knobs = given_knobs(context, flags)
        positional = []
        if command.argument and command.argument.knob:
            knobs[command.argument.knob] = values["argument"]
        elif command.argument:
            positional = [values["argument"]]
        if command.streams and not values["json"]:
            knobs["on_text"] = partial(click.echo, nl=False, file=sys.stdout)
        with reporting(values["debug"]):
            function = command.function
            gc.freeze()  # what the imports made stays; collecting among it would cost a third of a short command
            result = function(*positional, **knobs)
        if values["json"]:
            print_json(result if isinstance(result, dict) else result.as_dict())
        else:
            getattr(import_module(command.view), command.verb)(result)  # imports rich

    general = [
        click.Option(["--json"], is_flag=True),
        click.Option(["--debug"], is_flag=True),
        click.Option(["--help"], is_flag=True, is_eager=True, expose_value=False, callback=print_help),
    ]
    argument = [_click_argument(command.argument)] if command.argument else []
    return click.Command(
        command.name,
        params=[*argument, *options_of(flags), *general],
        callback=run,
        short_help=command.summary,
        add_help_option=False,
    )


def _click_argument(argument: Argument) -> click.Argument:
    nargs = -1 if argument.many else 1
    return click.Argument(["argument"], metavar=argument.name, required=argument.required, nargs=nargs)
