"""The public names of lorafleet are complete, importable and the same everywhere they are listed."""

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import lorafleet

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "src" / "lorafleet" / "__init__.py").read_text()


@pytest.mark.parametrize("name", sorted(lorafleet.__all__))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(lorafleet, name)
    assert name == "__version__" or (value.__doc__ or "").strip()


def test_the_lists_of_names_agree() -> None:
    typed = {
        alias.name
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorafleet")
        for alias in node.names
    }
    public = set(lorafleet.__all__) - {"__version__"}
    assert typed == public == set(lorafleet._HOMES)
    assert set(dir(lorafleet)) == set(lorafleet.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        _ = lorafleet.tran


def test_one_version() -> None:
    assert version("lorafleet") == lorafleet.__version__
    assert re.search(rf"^## {re.escape(lorafleet.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
