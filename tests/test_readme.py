"""What the README and the guide show is true: Python blocks run, commands parse, paths exist.

The ``python`` blocks of a file run in order, in one namespace and one empty folder. ``bash run`` blocks run there too;
in other ``bash`` blocks every ``lorafleet`` line must parse.
"""

import linecache
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from lorafleet.cli.commands import app

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
GUIDE, CHINESE_GUIDE = (sorted((ROOT / folder).glob("*.md")) for folder in ("docs/guide", "docs/zh/guide"))
PAGES = READMES + GUIDE + CHINESE_GUIDE
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    tags: list[str]
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2].split(), match[3], text[: match.start(3)].count("\n") + 1)
        for match in FENCE.finditer(text)
    ]


def commands_of(page: Path) -> list[tuple[int, list[str]]]:
    """The ``lorafleet`` lines of all bash blocks, with lines continued by a backslash joined."""
    found = []
    for block in blocks_of(page):
        if block.language in ("bash", "sh", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "lorafleet":
                    found.append((block.line, words[1:]))
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(page: Path, block: Block, namespace: dict[str, object]) -> None:
    # The blank lines make tracebacks show the page's own line numbers.
    source = "\n" * (block.line - 1) + block.text
    name = name_of(page)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


# The Chinese pages show the English ones' code; the last tests hold that.
@pytest.mark.parametrize("page", [READMES[0], *GUIDE], ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(page, block, namespace)
        elif block.language == "bash" and "run" in block.tags:
            subprocess.run(["bash", "-euc", block.text], check=True, env=os.environ | {"PATH": path})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    for line, words in commands_of(page):
        command: click.Command = app
        path = "lorafleet"
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
        assert not isinstance(command, click.Group), f"{page}:{line}: no such command: {path} {' '.join(words[:1])}"
        context = click.Context(app, info_name="lorafleet", **app.context_settings)
        try:
            command.make_context(path, list(words), parent=context)
        except click.exceptions.Exit:
            pass  # --help was asked for
        except click.ClickException as error:
            pytest.fail(f"{page}:{line}: {error.format_message()}")


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_readme_opens_with_the_two_commands(page: Path) -> None:
    first = blocks_of(page)[0]
    commands = [line.split("#")[0].strip() for line in first.text.splitlines()]
    assert (first.language, commands) == ("bash", ["scripts/quickstart", "scripts/test"])
    assert page.read_text(encoding="utf-8").splitlines().index("```bash") < 12


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_and_named_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link and link[0] != "#"]
    named = re.findall(r"`((?:src|scripts|docs|tests|\.ci|benchmarks)/[\w./-]*)`", text)
    named += re.findall(r"^((?:src|scripts|docs|tests)/[\w./-]*)\s", text, re.MULTILINE)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert missing == []


def test_both_readmes_show_the_same_code() -> None:
    english, chinese = ([(b.language, _without_comments(b.text)) for b in blocks_of(page)] for page in READMES)
    assert english == chinese


def test_the_guide_has_the_same_pages_in_both_languages() -> None:
    assert [page.name for page in GUIDE] == [page.name for page in CHINESE_GUIDE]
    assert len(GUIDE) == 8


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_both_guides_show_the_same_code(page: Path) -> None:
    english, chinese = (
        [(b.language, b.tags, b.text) for b in blocks_of(p)] for p in (page, ROOT / "docs/zh/guide" / page.name)
    )
    assert english == chinese


def _without_comments(text: str) -> str:
    return "\n".join(line.split("#")[0].rstrip() for line in text.splitlines())
