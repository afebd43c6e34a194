"""The text of ``--help``: flags in the groups in which they are declared."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import click

from lorafleet.cli.flags import Flag
from lorafleet.config import Section

GENERAL = [
    ("--json", "Print the result as one JSON object on stdout."),
    ("--debug", "Show more of what happens, and the traceback when it fails."),
    ("--help", "Show this text."),
]


class Argument(NamedTuple):
    """What stands before the flags: ``CONFIG``, ``VERSION…``, or ``PATH``, which gives the knob ``data``."""

    name: str
    required: bool
    help: str
    knob: str | None = None
    many: bool = False

    @property
    def usage(self) -> str:
        """``CONFIG`` in brackets when it may be left out, with dots when there may be several."""
        name = f"{self.name}…" if self.many else self.name
        return name if self.required else f"[{name}]"


def help_text(
    path: str, summary: str, argument: Argument | None, flags: Sequence[Flag], examples: Sequence[str]
) -> str:
    """Write the help of the command ``path``."""
    formatter = click.HelpFormatter(max_width=110, width=min(click.HelpFormatter().width + 40, 110))
    formatter.write_usage(path, f"{argument.usage} [FLAGS]" if argument else "[FLAGS]")
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(summary)
    if argument:
        with formatter.section("Argument"):
            formatter.write_dl([(argument.name, argument.help)])
    for heading, group in grouped(flags):
        with formatter.section(heading):
            formatter.write_dl([(flag.spelling, flag.help) for flag in group], col_max=34)
    with formatter.section("General"):
        formatter.write_dl(GENERAL, col_max=34)
    if examples:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {example}\n" for example in examples))
    return formatter.getvalue()


def grouped(flags: Sequence[Flag]) -> list[tuple[str, list[Flag]]]:
    """The flags by section, each under its name and the first line of its docstring."""
    return [(title(section), list(group)) for section, group in groupby(flags, key=lambda flag: flag.section)]


def title(section: type[Section]) -> str:
    """``Model: which base model, where it runs, and in which precision``."""
    what = (section.__doc__ or "").splitlines()[0].replace("``", "").rstrip(".")
    return f"{section.__name__.removesuffix('Config')}: {what[:1].lower()}{what[1:]}"
