"""What a flag's text becomes: every knob has a flag, and a flag gives what YAML would."""

from typing import Any

import click
import pytest

from lorafleet.cli.commands import EVERY
from lorafleet.cli.flags import Flag, dashed, flags_of, given_knobs, options_of
from lorafleet.config import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    known_names,
    load_sections,
)

SECTIONS = (
    LoraConfig,
    DataConfig,
    TrainingConfig,
    ValidationConfig,
    RunConfig,
    ModelConfig,
    PromptConfig,
    EvaluationConfig,
)


def knobs_of(*arguments: str) -> dict[str, Any]:
    flags = flags_of(SECTIONS)
    command = click.Command("c", params=[*options_of(flags)], callback=lambda **_: None)
    return given_knobs(command.make_context("c", list(arguments)), flags)


def test_nothing_given_is_nothing() -> None:
    assert knobs_of() == {}


@pytest.mark.parametrize(
    ("arguments", "knobs"),
    [
        (["--r", "4"], {"r": 4}),
        (["--lora-r=4"], {"lora_r": 4}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--lr", "fast"], {"lr": "fast"}),
        (["--max-steps", "null"], {"max_steps": None}),
        (["--revision", "1234567"], {"revision": "1234567"}),
        (["--eval-strategy", "no"], {"eval_strategy": "no"}),
        (["--target-modules", "q_proj,v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--target-modules", "q_proj", "--target-modules", "up_proj"], {"target_modules": ["q_proj", "up_proj"]}),
        (["--target-modules", "[q_proj, k_proj]"], {"target_modules": ["q_proj", "k_proj"]}),
        (["--target-modules", r".*\.(q|v)_proj{1,2}"], {"target_modules": r".*\.(q|v)_proj{1,2}"}),
        (["--target-modules", r"[qv]_proj"], {"target_modules": r"[qv]_proj"}),
        (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--modules-to-save", "lm_head"], {"modules_to_save": ["lm_head"]}),
        (["--layers-to-transform", "0,1"], {"layers_to_transform": ["0", "1"]}),
        (["--layers-to-transform", "null"], {"layers_to_transform": None}),
        (["--rank-pattern", "{q_proj: 16}"], {"rank_pattern": {"q_proj": 16}}),
        (["--rank-pattern", "q_proj: 16"], {"rank_pattern": {"q_proj": 16}}),
        (["--prompt", "Hello, world"], {"prompt": "Hello, world"}),
        (["--prompt", "[a, b]", "--prompt", "c,d"], {"prompt": ["[a, b]", "c,d"]}),
        (["--use-rslora"], {"use_rslora": True}),
        (["--no-use-rslora"], {"use_rslora": False}),
        (["--no-keep-best"], {"keep_best": False}),
        (["--no-answers"], {"answers": False}),
        (["--resume-from-checkpoint"], {"resume_from_checkpoint": True}),
        (["--resume", "runs/a/checkpoint-3"], {"resume": "runs/a/checkpoint-3"}),
        (["--resume", "false"], {"resume": False}),
        (["--completion-only-loss"], {"completion_only_loss": True}),
        (["--no-assistant-only-loss"], {"assistant_only_loss": False}),
        (["--r", "4", "--rank", "8"], {"r": 4, "rank": 8}),
    ],
)
def test_text_becomes_the_value_that_yaml_holds(arguments: list[str], knobs: dict[str, Any]) -> None:
    assert knobs_of(*arguments) == knobs


@pytest.mark.parametrize("flag", flags_of((*SECTIONS,)), ids=lambda flag: flag.key)
def test_every_default_can_be_typed(flag: Flag) -> None:
    default = flag.field.get_default(call_default_factory=True)
    if not flag.default:
        assert flag.required or default is None or not default
        return
    on = flag.default == "true"
    arguments = [f"--{'' if on else 'no-'}{dashed(flag.key)}"] if flag.kind == "boolean" else None
    knobs = knobs_of(*(arguments or [f"--{dashed(flag.key)}", flag.default]))
    needed = {key: "x" for key, field in flag.section.model_fields.items() if field.is_required() and key != flag.key}
    (section,) = load_sections((flag.section,), needed, knobs)
    assert getattr(section, flag.key) == default


def test_every_knob_of_every_command_has_a_flag_and_a_description() -> None:
    for command in EVERY.values():
        flags = {flag.key: flag for flag in command.flags}
        given = {command.argument.knob} - {None} if command.argument else set()
        assert set(flags) | given == set(known_names(command.sections).values())
        assert all(flag.field.description for flag in flags.values())
