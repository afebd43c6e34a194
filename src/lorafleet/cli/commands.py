"""The commands: for each its words, its sections, the library function it calls, and how its result is shown."""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click

import lorafleet
from lorafleet.cli.flags import Flag, flags_of, given_knobs, options_of
from lorafleet.cli.help import Argument, help_text
from lorafleet.cli.output import print_json, reporting
from lorafleet.cli.quickstart import KNOBS, quickstart
from lorafleet.config import (
    AdapterConfig,
    AdviseConfig,
    CompareConfig,
    DataConfig,
    EstimateConfig,
    EvaluationConfig,
    GenerationConfig,
    LoraConfig,
    MergeConfig,
    MethodConfig,
    MethodsConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    SearchConfig,
    Section,
    TrainingConfig,
    ValidationConfig,
)

CONFIG = Argument("CONFIG", False, "A YAML file with any of the knobs below (learning_rate: 1e-4); flags override it.")


@dataclass(frozen=True)
class Command:
    """One command: ``lorafleet <name> [ARGUMENT] --flags``.

    It calls ``lorafleet.<verb>(argument, **knobs)`` and prints what comes back with ``show.<verb>``.

    Attributes:
        name: The word on the command line.
        verb: The public function.
        summary: One line for the help.
        sections: Where its flags come from; the same that the verb reads.
        argument: What stands before the flags.
        defaults: Defaults that differ from the declared ones.
        call: The function where it is not a public one.
        streams: Whether the verb takes ``on_text`` and its text is printed as it comes.
        examples: Command lines for the help.
    """

    name: str
    verb: str
    summary: str
    sections: tuple[type[Section], ...] = ()
    argument: Argument | None = CONFIG
    defaults: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    streams: bool = False
    examples: tuple[str, ...] = ()

    @property
    def flags(self) -> list[Flag]:
        """The flags of its sections, less the knob that the argument gives."""
        given = [self.argument.knob] if self.argument and self.argument.knob else []
        return flags_of(self.sections, given, self.defaults)

    @property
    def function(self) -> Callable[..., Any]:
        """What the command calls; looked up late, because it imports torch."""
        return self.call or getattr(lorafleet, self.verb)


COMMANDS = (
    Command(
        "train",
        "train",
        "Fine-tune a model: a LoRA adapter on a frozen base, or another method.",
        (ModelConfig, DataConfig, MethodConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig),
        examples=(
            "lorafleet train --model smollm2-135m --data rows.jsonl --output-dir runs/first",
            "lorafleet train run.yml --learning-rate 1e-4 --r 16 --no-load-best-model-at-end",
            "lorafleet train run.yml --method prefix:num_virtual_tokens=20",
            "lorafleet train run.yml --resume-from-checkpoint",
        ),
    ),
    Command(
        "tune",
        "tune",
        "Find the best settings: train many adapters side by side, stop the worse ones early.",
        (ModelConfig, DataConfig, LoraConfig, TrainingConfig, RunConfig, SearchConfig),
        examples=(
            "lorafleet tune --model smollm2-135m --data rows.jsonl --max-steps 60 --output-dir runs/search",
            "lorafleet tune search.yml --space classic",
            "lorafleet tune run.yml --space '{learning_rate: {log: [1e-4, 3e-3]}, r: [4, 16]}' --n-trials 12",
            "lorafleet tune search.yml --resume-from-checkpoint",
        ),
    ),
    Command(
        "compare",
        "compare",
        "Measure methods beside each other: LoRA, full fine-tuning, prefix tuning, bottleneck adapters …",
        (
            ModelConfig,
            DataConfig,
            LoraConfig,
            TrainingConfig,
            ValidationConfig,
            RunConfig,
            CompareConfig,
            MethodsConfig,
        ),
        examples=(
            "lorafleet compare --model smollm2-135m --data rows.jsonl --max-steps 60 --output-dir runs/methods",
            "lorafleet compare methods.yml --methods lora:r=8,dora:r=8,ia3",
        ),
    ),
    Command(
        "estimate",
        "estimate",
        "Work out parameters, memory, disk and time of methods before anything is trained.",
        (ModelConfig, DataConfig, LoraConfig, TrainingConfig, MethodsConfig, EstimateConfig),
        examples=(
            "lorafleet estimate --model smollm2-135m --data rows.jsonl --methods full,lora:r=8,lora:r=64",
            "lorafleet estimate run.yml --tasks 1000 --json",
        ),
    ),
    Command(
        "advise",
        "advise",
        "Choose settings for a model and rows, each with its reason, as a file for train.",
        (ModelConfig, DataConfig, LoraConfig, TrainingConfig, ValidationConfig, AdviseConfig),
        examples=(
            "lorafleet advise --model smollm2-135m --data rows.jsonl > run.yml && lorafleet train run.yml",
            "lorafleet advise --model smollm2-135m --data rows.jsonl --goal memory --max-steps 100",
        ),
    ),
    Command(
        "eval",
        "evaluate",
        "Measure loss, perplexity, label accuracy and exact match of an adapter beside its base.",
        (ModelConfig, AdapterConfig, DataConfig, EvaluationConfig, GenerationConfig),
        examples=("lorafleet eval --adapter runs/first --data rows.jsonl --predictions predictions.jsonl",),
    ),
    Command(
        "generate",
        "generate",
        "Answer prompts with the base or an adapter.",
        (ModelConfig, AdapterConfig, PromptConfig, GenerationConfig),
        streams=True,
        examples=(
            'lorafleet generate --adapter runs/first --prompt "Hello" --with-base',
            "lorafleet generate --model smollm2-135m --prompts questions.txt --temperature 0.7 --json",
        ),
    ),
    Command(
        "merge",
        "merge",
        "Fold an adapter into its base, write the model, and check it by its logits.",
        (ModelConfig, AdapterConfig, MergeConfig),
        examples=("lorafleet merge --adapter runs/first --output-dir merged",),
    ),
    Command(
        "inspect",
        "inspect",
        "Count parameters, shapes and bytes of an adapter, or of a model from its config alone.",
        (ModelConfig, LoraConfig),
        Argument("TARGET", True, "An adapter's folder, a model's folder, or a hub id."),
        examples=("lorafleet inspect runs/first", "lorafleet inspect meta-llama/Llama-3.3-70B-Instruct --r 16"),
    ),
    Command("doctor", "doctor", "Show versions, device, memory, threads, and what works here.", (), None),
)
QUICKSTART = Command(
    "quickstart",
    "quickstart",
    "Fine-tune a small model on film reviews, test it beside its base, merge it: minutes on two cores, offline. "
    "An earlier run in runs/quickstart is replaced; one in another folder only with --overwrite.",
    (LoraConfig, TrainingConfig, ValidationConfig, RunConfig),
    argument=None,
    defaults=KNOBS,
    call=quickstart,
    examples=("lorafleet quickstart", "lorafleet quickstart --max-steps 20 --output-dir /tmp/quickstart"),
)
DATA_INSPECT = Command(
    "inspect",
    "inspect_data",
    "Read rows as training would, and show counts, faults, token statistics and one decoded example.",
    (ModelConfig, DataConfig),
    Argument("PATH", True, "A file, a folder with train/valid/test, a hub id, or sample:movie_polarity.", "data"),
    examples=("lorafleet data inspect rows.jsonl --model smollm2-135m",),
)


def _click_command(command: Command, parents: str = "lorafleet") -> click.Command:
    flags = command.flags
    path = f"{parents} {command.name}"

    def print_help(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            click.echo(help_text(path, command.summary, command.argument, flags, command.examples), nl=False)
            context.exit()

    def run(**values: Any) -> None:
        context = click.get_current_context()
        knobs = given_knobs(context, flags)
        positional = []
        if command.argument and command.argument.knob:
            knobs[command.argument.knob] = values["argument"]
        elif command.argument:
            positional = [values["argument"]]
        if command.streams and not values["json"]:
            knobs["on_text"] = partial(click.echo, nl=False, file=sys.stdout)
        with reporting(values["debug"]):
            function = command.function
            gc.freeze()  # what the imports made stays; collecting among it would cost a third of a short command
            result = function(*positional, **knobs)
        if values["json"]:
            print_json(result if isinstance(result, dict) else result.as_dict())
        else:
            from lorafleet.cli import show  # imports rich

            getattr(show, command.verb)(result)

    general = [
        click.Option(["--json"], is_flag=True),
        click.Option(["--debug"], is_flag=True),
        click.Option(["--help"], is_flag=True, is_eager=True, expose_value=False, callback=print_help),
    ]
    argument = [_click_argument(command.argument)] if command.argument else []
    return click.Command(
        command.name,
        params=[*argument, *options_of(flags), *general],
        callback=run,
        short_help=command.summary,
        add_help_option=False,
    )


def _click_argument(argument: Argument) -> click.Argument:
    return click.Argument(["argument"], metavar=argument.name, required=argument.required)


def _click_group(commands: Sequence[Command]) -> click.Group:
    data = click.Group("data", [_click_command(DATA_INSPECT, "lorafleet data")], short_help="Look at data.")
    group = click.Group(
        "lorafleet",
        [*(_click_command(command) for command in commands), data],
        help="Train, keep and use LoRA adapters, one or many on one frozen base.",
        epilog="lorafleet COMMAND --help shows a command's flags; docs/cli.md lists all of them.",
        context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
    )
    return click.version_option(lorafleet.__version__, message="lorafleet %(version)s")(group)


app = _click_group((*COMMANDS, QUICKSTART))
