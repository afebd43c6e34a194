"""The entry point: parse, run one command, turn what goes wrong into one message and an exit code.

Exit codes: 0 done · 1 a LorafleetError or an unexpected exception · 2 a wrong flag, knob or YAML key · 130 interrupted.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from lorafleet.cli.commands import app
from lorafleet.errors import LorafleetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (``sys.argv`` when not given) and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _never_fail_to_encode()
    if "_LORAFLEET_COMPLETE" in os.environ:
        app.main(prog_name="lorafleet")
    try:
        with app.make_context("lorafleet", arguments) as context:
            app.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "lorafleet"
        return _fail(f"{error.format_message()}\nsee: {path} --help", error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except LorafleetError as error:
        return _fail(str(error), error.exit_code, arguments)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130, arguments)
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        what = " ".join([f"{type(error).__name__}:", *str(error).split()]).removesuffix(":")
        hint = "" if "--debug" in arguments else "\n--debug shows the traceback"
        return _fail(what + hint, 1, arguments)


def _fail(message: str, exit_code: int, arguments: Sequence[str] = ()) -> int:
    # A reader of stderr that has gone must not hide the exit code.
    with contextlib.suppress(BrokenPipeError):
        if "--debug" in arguments:
            click.echo(traceback.format_exc(), err=True)
        click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)
    return exit_code


def _never_fail_to_encode() -> None:
    """Text that the terminal's encoding lacks is escaped instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
