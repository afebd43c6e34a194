"""A package imports only from those before it; config and --help need no torch; every import is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorafleet"
LAYERS = ["errors", "pace", "cache", "config", "lora", "models", "files", "registry", "methods", "data", "generation"]
LAYERS += ["evaluation", "training", "search", "estimation", "advice", "comparison", "fleets", "serving", "export"]
LAYERS += ["cli"]
FILES = sorted(SOURCE.rglob("*.py"))


def imported_modules(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, anywhere in it, with the line."""
    package = path.relative_to(SOURCE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            # ``from lorafleet import data`` imports a layer by name.
            if module == "lorafleet":
                yield from ((node.lineno, f"lorafleet.{alias.name}") for alias in node.names if alias.name in LAYERS)


def layer_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return "cli" if first == "__main__.py" else first.removesuffix(".py")


def layer_faults(path: Path, text: str) -> list[str]:
    own = layer_of(path)
    if own == "__init__":
        return []  # the lazy exports name every layer and import none
    faults = []
    for line, module in imported_modules(path, text):
        parts = module.split(".")
        if parts[0] != "lorafleet" or (module == "lorafleet" and names_of_root(text) <= {"__version__"}):
            continue
        other = parts[1] if len(parts) > 1 else "cli"  # the root package exports every verb: for the cli alone
        if LAYERS.index(other) > LAYERS.index(own):
            faults.append(f"{path.relative_to(ROOT)}:{line} is in {own} and imports {module}")
    return faults


def names_of_root(text: str) -> set[str]:
    """What a file takes from the root package: ``lorafleet.x`` and ``from lorafleet import x``."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lorafleet":
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "lorafleet":
            names |= {alias.name for alias in node.names if alias.name not in LAYERS}
    return names


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(path) for path in FILES} - {"__init__", "samples"} <= set(LAYERS)


def test_packages_import_only_from_those_before_them() -> None:
    assert [fault for path in FILES for fault in layer_faults(path, path.read_text())] == []


@pytest.mark.parametrize(
    "text",
    [
        "import lorafleet.training.run",
        "from lorafleet.cli import show",
        "def f():\n    from lorafleet.evaluation import metrics",
        "from ..training import run",
        "from .. import training",
        "from lorafleet import training",
        "import lorafleet\nlorafleet.train()",
        "from lorafleet import train",
    ],
)
def test_a_wrong_import_is_found(text: str) -> None:
    assert len(layer_faults(SOURCE / "data" / "new.py", text)) >= 1
    assert layer_faults(SOURCE / "cli" / "new.py", text) == []


@pytest.mark.parametrize("text", ["import lorafleet\nlorafleet.__version__", "from lorafleet import __version__"])
def test_the_version_is_for_everyone(text: str) -> None:
    assert layer_faults(SOURCE / "files" / "new.py", text) == []


@pytest.mark.parametrize(
    "code",
    [
        "import lorafleet; lorafleet.__version__; dir(lorafleet)",
        "import lorafleet; lorafleet.LoraConfig(r=4)",
        "import lorafleet.config",
        "from lorafleet.cli.main import main; main(['--help']); main(['train', '--help'])",
        "from lorafleet.cli.main import main; main(['train', '--leaning-rate', '1'])",
    ],
)
def test_torch_is_imported_only_when_needed(code: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy', 'rich'} & set(sys.modules)"
    check = f"import sys\n{code}\nassert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name_of(line) for line in project["dependencies"]}
    optional = {name_of(line) for lines in project["optional-dependencies"].values() for line in lines}
    homes = packages_distributions()
    undeclared = {}
    for path in FILES:
        for line, module in imported_modules(path, path.read_text()):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == "lorafleet":
                continue
            if not {normal(name) for name in homes.get(top, [top])} & (declared | optional):
                undeclared[f"{path.relative_to(ROOT)}:{line}"] = module
    assert undeclared == {}


def name_of(requirement: str) -> str:
    return normal(re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
