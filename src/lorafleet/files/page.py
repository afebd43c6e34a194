"""Reports as a page that loads nothing, and as Markdown."""

import re
from collections.abc import Sequence
from html import escape


def document(title: str, body: str, style: str = "") -> str:
    """A whole page around ``body``, with more ``style`` where it needs some."""
    return _PAGE.replace("@title@", escape(title)).replace("@style@", style).replace("@body@", body)


_SHORT = 12
"""Characters of a cell that stays on one line: a figure with its unit."""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None, wide: int) -> str:
    """A table that becomes a list on a narrow screen.

    Args:
        head: Names of the columns.
        rows: Their cells, as plain text.
        best: The row that stands out.
        wide: The column that leads each row of the list.
    """
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for number, row in enumerate(rows):
        cells = ""
        for column, (name, cell) in enumerate(zip(head, row, strict=True)):
            kind = " class=wide" if column == wide else " class=short" if len(cell) <= _SHORT else ""
            cells += f'<td{kind} data-name="{escape(name)}">{escape(cell)}</td>'
        body += f"<tr{' class=best' if number == best else ''}>{cells}</tr>"
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)


def markdown_cell(text: str) -> str:
    """A text without what would end its cell or its row."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title@</title>
<style>
:root { color-scheme: light; --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --best: #c2410c; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0.25rem; }
.note { color: var(--soft); margin: 0 0 0.5rem; }
figure { margin: 0; } svg { width: 44rem; max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { overflow-wrap: normal; }
td.wide { min-width: 14rem; } td.short { white-space: nowrap; }
tr.best { background: #fff7ed; } tr.best td { font-weight: 600; }
pre { background: #f8fafc; border: 1px solid var(--line); padding: 0.75rem; font-size: 0.85rem; white-space: pre-wrap; }
@style@
@media (max-width: 45rem) { /* a table of many columns becomes a list */
  thead { display: none; } td { display: inline-block; border: 0; padding: 0 1rem 0 0; }
  tr { display: block; border-bottom: 1px solid var(--line); padding: 0.5rem; }
  td.wide { display: block; min-width: 0; font-weight: 600; } td:empty { display: none; }
  td:not(.wide)::before { content: attr(data-name) " "; color: var(--soft); }
}
</style></head><body>
@body@
</body></html>
"""
