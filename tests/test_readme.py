"""What the README and the guide show is true: Python blocks run, commands and YAML are accepted, paths exist.

The ``python`` blocks of a file run in order, in one namespace and one empty folder; a ``text output`` block is what the
block before it prints. ``bash run`` blocks run there too. In other ``bash`` blocks every ``lorafleet`` line must parse
and its values must be valid, together with those of the YAML file that it names: a ``yaml`` block of the same page that
begins with ``# <name of the file>``.
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

from lorafleet.cli.command import CONFIG, Command
from lorafleet.cli.commands import EVERY, app
from lorafleet.cli.flags import given_knobs
from lorafleet.config import load_sections
from lorafleet.errors import ConfigError
from lorafleet.fleets.plan import read_plan

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
GUIDE, CHINESE_GUIDE = (sorted((ROOT / folder).glob("*.md")) for folder in ("docs/guide", "docs/zh/guide"))
PAGES = READMES + GUIDE + CHINESE_GUIDE
TRANSLATIONS = [tuple(READMES), *((page, ROOT / "docs/zh/guide" / page.name) for page in GUIDE)]
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
                    end = words.index(">") if ">" in words else None  # into a file
                    found.append((block.line, words[1:end]))
    return found


def yaml_files(page: Path, folder: Path) -> dict[str, Path]:
    """Write the page's YAML blocks as the files that their first lines name."""
    files = {}
    for block in blocks_of(page):
        if block.language == "yaml":
            name = block.text.splitlines()[0].removeprefix("# ")
            files[name] = folder / name
            files[name].write_text(block.text, encoding="utf-8")
    return files


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(page: Path, block: Block, namespace: dict[str, object]) -> None:
    # The blank lines make tracebacks show the page's own line numbers.
    source = "\n" * (block.line - 1) + block.text
    name = name_of(page)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


# The Chinese pages show the English ones' code; the last test holds that.
@pytest.mark.parametrize("page", [READMES[0], *GUIDE], ids=name_of)
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python":
            capsys.readouterr()
            run_python(page, block, namespace)
        elif block.tags == ["output"]:
            assert capsys.readouterr().out == block.text, f"{name_of(page)}:{block.line}"
        elif block.language == "bash" and "run" in block.tags:
            subprocess.run(["bash", "-euc", block.text], check=True, env=os.environ | {"PATH": path})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page: Path, tmp_path: Path) -> None:
    files = yaml_files(page, tmp_path)
    for line, words in commands_of(page):
        place = f"{name_of(page)}:{line}: lorafleet {' '.join(words)}"
        command: click.Command = app
        path = "lorafleet"
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
        assert not isinstance(command, click.Group), f"{place}: no such command"
        parent = click.Context(app, info_name="lorafleet", **app.context_settings)
        try:
            context = command.make_context(path, list(words), parent=parent)
            check_values(EVERY[path], context, files)
        except click.exceptions.Exit:
            pass  # --help was asked for
        except click.ClickException as error:
            pytest.fail(f"{place}: {error.format_message()}")
        except (ConfigError, KeyError) as error:
            pytest.fail(f"{place}: {error}")


def check_values(command: Command, context: click.Context, files: dict[str, Path]) -> None:
    """Validate a command line's flags and its YAML file as the command itself would."""
    knobs = dict(command.defaults) | given_knobs(context, command.flags)
    argument, source = context.params.get("argument"), None
    if command.argument is not None and command.argument.knob is not None:
        knobs[command.argument.knob] = argument
    elif argument is not None and (command.argument is CONFIG or command.verb == "fleet"):
        source = files[argument]
    if command.verb == "fleet":
        assert source is not None
        read_plan(source, knobs)
    else:
        load_sections(command.sections, source, knobs)


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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_sections_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^):]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    assert [anchor for path, anchor in links if anchor not in anchors_of(page.parent / path if path else page)] == []


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_guide_has_the_same_pages_in_both_languages() -> None:
    assert [page.name for page in GUIDE] == [page.name for page in CHINESE_GUIDE]
    assert len(GUIDE) == 14


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS, ids=name_of)
def test_both_languages_have_the_same_sections_and_code(english: Path, chinese: Path) -> None:
    assert [shape_of(block) for block in blocks_of(english)] == [shape_of(block) for block in blocks_of(chinese)]
    assert headings_of(english) == headings_of(chinese)


def shape_of(block: Block) -> tuple[str, list[str], str]:
    """A block without its comments, which are translated in the READMEs."""
    return block.language, block.tags, "\n".join(line.split("#")[0].rstrip() for line in block.text.splitlines())


def headings_of(page: Path) -> list[int]:
    """The levels of the headings, in order."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [len(found) for found in re.findall(r"^(#+) ", text, re.MULTILINE)]
