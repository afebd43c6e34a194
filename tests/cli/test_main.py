"""The command as a whole: what goes to stdout and stderr, exit codes, messages, interrupts, pipes."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import lorafleet
from lorafleet.cli.commands import EVERY
from lorafleet.cli.main import main
from lorafleet.cli.tables import clock
from lorafleet.config import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.errors import ConfigError, Interrupted, TrainingError


class Result:
    def as_dict(self) -> dict[str, Any]:
        return {"output_dir": Path("runs/a"), "train_loss": float("nan"), "rows": {"read": 3}, "名": "值"}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of ``lorafleet.train``."""
    return lambda function: monkeypatch.setitem(vars(lorafleet), "train", function)


def failing(error: BaseException) -> Callable[..., Any]:
    def train(*_: Any, **__: Any) -> None:
        raise error

    return train


def test_the_verb_gets_the_file_and_the_knobs(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    verb(lambda *args, **knobs: calls.append((args, knobs)) or Result())
    assert main(["train", "run.yml", "--lr", "1e-3", "--output_dir", "o", "--no-overwrite", "--json"]) == 0
    assert main(["train", "--r=4", "--json"]) == 0
    assert calls == [(("run.yml",), {"lr": 1e-3, "output_dir": "o", "overwrite": False}), ((None,), {"r": 4})]


def test_json_is_one_object_and_the_rest_is_on_stderr(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*_: Any, **__: Any) -> Result:
        print("a library that prints")
        logging.getLogger("lorafleet.training").info("step 1")
        logging.getLogger("lorafleet.training").warning("slow")
        logging.getLogger("lorafleet.training").debug("hidden")
        return Result()

    verb(train)
    assert main(["train", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"output_dir": "runs/a", "train_loss": None, "rows": {"read": 3}, "名": "值"}
    assert captured.err == "a library that prints\nstep 1\nwarning: slow\n"


def test_logging_is_left_as_it_was(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lorafleet")
    before = (logger.level, list(logger.handlers))
    verb(failing(TrainingError("x")))
    main(["train", "--debug"])
    assert (logger.level, list(logger.handlers)) == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("r = 0: too small"), 2, "error: r = 0: too small\n"),
        (TrainingError("loss is NaN at step 3"), 1, "error: loss is NaN at step 3\n"),
        (Interrupted("stopped; resume with --resume"), 130, "error: stopped; resume with --resume\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (EOFError("cut\noff"), 1, "error: EOFError: cut off\n--debug shows the traceback\n"),
        (RuntimeError(""), 1, "error: RuntimeError\n--debug shows the traceback\n"),
    ],
)
def test_exit_codes(
    verb: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    verb(failing(error))
    assert main(["train", "--json"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)
    assert main(["train", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--leaning-rate", "1"], "'--learning-rate'"),
        (["trian"], "Did you mean 'train'?"),
        (["train", "a.yml", "b.yml"], "b.yml"),
        (["train", "--r"], "requires an argument"),
        (["data", "inspect"], "Missing argument 'PATH'"),
        (["inspect"], "Missing argument 'TARGET'"),
        (["data"], "inspect"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_faults_of_flags_and_file_come_together(verb: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("rnk: 3\n")
    verb(lambda config, **knobs: load_sections((LoraConfig,), config, knobs))
    assert main(["train", str(path), "--lora-r", "0", "--bias", "al"]) == 2
    err = capsys.readouterr().err
    for part in ("unknown key 'rnk'", "did you mean 'rank'?", "lora_r = 0", "bias = 'al'", "3 faults"):
        assert part in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["train", "--help"], ["data", "inspect", "--help"], ["--version"]):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.out
        assert not captured.err
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--learning-rate NUMBER" in text
    assert "--lr " not in text  # other names are accepted, not shown


def command(code: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    code = f"import sys, lorafleet; from lorafleet.cli.main import main\n{code}"
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, **kwargs)


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "class R:\n def as_dict(self): return {'a': 'x' * 100000}\n"
    code += "lorafleet.train = lambda *a, **k: R()\nsys.exit(main(['train', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, lorafleet\nfrom lorafleet.cli.main import main\n{code}"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_text_that_the_terminal_lacks_is_escaped() -> None:
    code = "class R:\n def as_dict(self): return {'a': '中'}\n"
    code += "lorafleet.train = lambda *a, **k: R()\nsys.exit(main(['train', '--json']))"
    done = command(code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"a": "中"}


def test_every_command_has_its_verb_and_its_view() -> None:
    for command in EVERY.values():
        sections = getattr(sys.modules[command.function.__module__], "SECTIONS", None)
        assert sections is None or sections == command.sections
        assert callable(getattr(import_module(command.view), command.verb))


@pytest.mark.parametrize(
    ("seconds", "told"), [(4.23, "4.2 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (18_130, "5 h 02 min")]
)
def test_times_as_people_write_them(seconds: float, told: str) -> None:
    assert clock(seconds) == told
