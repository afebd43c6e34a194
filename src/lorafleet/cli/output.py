"""Where output goes: one result on stdout, progress and logs on stderr."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Show the library's log records on stderr: coloured on a terminal, plain lines otherwise.

    While it lasts, whatever a library prints goes to stderr, so that stdout holds the result alone.
    """
    logger = logging.getLogger("lorafleet")
    handler = _handler()
    handler.addFilter(_mark)
    handler.setFormatter(logging.Formatter("%(mark)s%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; numbers that JSON lacks (NaN, infinity) become null."""
    click.echo(json.dumps(_plain(result), ensure_ascii=False, indent=2, allow_nan=False))


def _handler() -> logging.Handler:
    if not sys.stderr.isatty():
        return logging.StreamHandler(sys.stderr)
    from rich.console import Console
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    console, plain = Console(stderr=True), NullHighlighter()
    return RichHandler(console=console, highlighter=plain, show_time=False, show_level=False, show_path=False)


def _mark(record: logging.LogRecord) -> bool:
    record.mark = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
