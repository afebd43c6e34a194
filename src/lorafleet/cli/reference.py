"""docs/cli.md, generated: ``python -m lorafleet.cli.reference`` writes it, ``--check`` fails when it is out of date."""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import get_type_hints

from lorafleet.cli.command import Command
from lorafleet.cli.commands import EVERY
from lorafleet.cli.flags import Flag, dashed
from lorafleet.cli.help import GENERAL, grouped

TARGET = Path(__file__).parents[3] / "docs" / "cli.md"

INTRODUCTION = """\
# The command line

<!-- Written by `python -m lorafleet.cli.reference`; scripts/check fails when it is out of date. Do not edit. -->

`lorafleet COMMAND [CONFIG.yml] --flags`. Every flag is also a YAML key (`--learning-rate` is `learning_rate:`) and a
keyword of the Python function of the same name. A flag overrides the file. Flags are accepted with dashes and with
underscores. Unknown flags and keys are errors; all faults are reported at once.

- Lists: `--target-modules q_proj,v_proj`, or the flag repeated. Mappings: `--rank-pattern '{q_proj: 16}'`.
- The result goes to stdout, progress and logs to stderr. With `--json` stdout holds one JSON object; when a command
  fails it holds nothing, and the message is on stderr.
- Exit codes: 0 done, 1 failed, 2 wrong flag or configuration, 130 interrupted.
"""


def reference() -> str:
    """Write the whole page."""
    general = "\n".join(f"| `{name}` | {text} |" for name, text in GENERAL)
    sections = [_command(path, command) for path, command in EVERY.items()]
    return "\n".join([INTRODUCTION, "Every command has:", "", "| flag | |", "| --- | --- |", general, "", *sections])


def _command(path: str, command: Command) -> str:
    usage = f" {command.argument.usage}" if command.argument else ""
    lines = [f"## {path}", "", command.summary, "", "```", f"{path}{usage} [FLAGS]"]
    lines += ["```", ""]
    if command.argument:
        lines += [f"`{command.argument.name}`: {command.argument.help}", ""]
    if command.examples:
        lines += ["Examples:", "", "```bash", *command.examples, "```", ""]
    for heading, flags in grouped(command.flags):
        lines += [f"**{heading}**", "", "| flag | default | meaning | other names |", "| --- | --- | --- | --- |"]
        lines += [*map(_row, flags), ""]
    return "\n".join([*lines, *_fields(command)])


def _fields(command: Command) -> list[str]:
    """The fields of the command's ``--json``, from the docstring of what its function returns."""
    result = get_type_hints(command.function)["return"]
    attributes = (inspect.getdoc(result) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    joined = re.sub(r"\n {8,}", " ", attributes)  # a description goes on in deeper lines
    rows = [line.strip().partition(": ") for line in joined.splitlines() if line.strip()]
    if not rows:
        return ["`--json` prints the same facts under the same names.", ""]
    table = [f"| `{name}` | {meaning.replace('|', chr(92) + '|').replace('``', '`')} |" for name, _, meaning in rows]
    return ["**`--json` prints**", "", "| field | meaning |", "| --- | --- |", *table, ""]


def _row(flag: Flag) -> str:
    default = "required" if flag.required else f"`{flag.default}`" if flag.default else ""
    others = ", ".join(f"`--{dashed(name)}`" for name in flag.others)
    cells = (f"`{flag.spelling}`", default, flag.field.description or "", others)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    """Write the page, or compare it with ``--check``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when docs/cli.md is out of date")
    check = parser.parse_args().check
    text = reference()
    if check:
        fresh = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        if not fresh:
            print(f"{TARGET} is out of date; run: python -m lorafleet.cli.reference", file=sys.stderr)
        return 0 if fresh else 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
