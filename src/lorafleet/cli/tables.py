"""The parts of which results for people are made: facts, comparisons, numbers with their units."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lorafleet.evaluation.metrics import in_figures, in_words


def put(*parts: RenderableType) -> None:
    """Print on stdout, a text as it is; without a terminal lines are not broken at 80 columns."""
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(*parts, sep="\n")


def facts(rows: Iterable[tuple[str, Any]]) -> Table:
    """Two columns: what, and how much. Rows whose value is None are left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value is not None:
            table.add_row(Text(name, style="bold"), value if isinstance(value, Table) else Text(str(value)))
    return table


def comparison(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """One row for each metric, one column for each of the named measurements."""
    table = Table("metric", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for metric in dict.fromkeys(name for values in columns.values() for name in values):
        cells = (values.get(metric) for values in columns.values())
        table.add_row(in_words(metric), *("" if cell is None else in_figures(metric, cell) for cell in cells))
    return table


def size(count: float | None) -> str | None:
    """Bytes in decimal units: ``2.45 MB``."""
    if count is None:
        return None
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"


def share(part: int, whole: int | None) -> str:
    """``2,442,240 (1.78 % of 137,000,000)``."""
    return f"{part:,} ({part / whole:.2%} of {whole:,})" if whole else f"{part:,}"


def clock(seconds: float) -> str:
    """``4.2 s``, ``2 min 05 s`` or ``5 h 02 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, more = divmod(minutes, 60)
    if hours:
        return f"{hours} h {more:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
