"""All commands: for each its words, its sections, and the library function it calls."""

import click

import lorafleet
from lorafleet.cli.adapters import ADAPTERS
from lorafleet.cli.command import Command, click_command
from lorafleet.cli.help import Argument
from lorafleet.cli.quickstart import KNOBS
from lorafleet.config import (
    FLEET_DEFAULTS,
    AdapterConfig,
    AdviseConfig,
    ChatConfig,
    CompareConfig,
    DataConfig,
    EstimateConfig,
    EvaluationConfig,
    FleetConfig,
    GenerationConfig,
    LoraConfig,
    MergeConfig,
    MethodConfig,
    MethodsConfig,
    ModelConfig,
    PoolConfig,
    PopulationConfig,
    PromptConfig,
    RegistryConfig,
    RunConfig,
    SearchConfig,
    TrainingConfig,
    ValidationConfig,
)

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
        (ModelConfig, DataConfig, LoraConfig, TrainingConfig, RunConfig, SearchConfig, PopulationConfig),
        examples=(
            "lorafleet tune --model smollm2-135m --data rows.jsonl --max-steps 60 --output-dir runs/search",
            "lorafleet tune search.yml --space classic",
            "lorafleet tune run.yml --space '{learning_rate: {log: [1e-4, 3e-3]}, r: [4, 16]}' --n-trials 12",
            "lorafleet tune search.yml --resume-from-checkpoint",
        ),
    ),
    Command(
        "fleet",
        "fleet",
        "Train one adapter for each task or user together, let the good ones through, keep all in the registry.",
        (ModelConfig, RunConfig, PopulationConfig, RegistryConfig, FleetConfig),
        Argument("CONFIG", True, "A YAML file with tasks or users, their defaults and gates; flags override the rest."),
        defaults=FLEET_DEFAULTS,
        examples=("lorafleet fleet fleet.yml", "lorafleet fleet fleet.yml --resume-from-checkpoint"),
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
        (ModelConfig, AdapterConfig, RegistryConfig, DataConfig, EvaluationConfig, GenerationConfig),
        examples=("lorafleet eval --adapter runs/first --data rows.jsonl --predictions predictions.jsonl",),
    ),
    Command(
        "generate",
        "generate",
        "Answer prompts with the base or an adapter.",
        (ModelConfig, AdapterConfig, RegistryConfig, PromptConfig, GenerationConfig),
        streams=True,
        examples=(
            'lorafleet generate --adapter runs/first --prompt "Hello" --with-base',
            "lorafleet generate --model smollm2-135m --prompts questions.txt --temperature 0.7 --json",
        ),
    ),
    Command(
        "chat",
        "chat",
        "Talk with the base and its adapters: switch with /adapter, put two side by side with /compare.",
        (ModelConfig, AdapterConfig, RegistryConfig, ChatConfig, GenerationConfig, PoolConfig),
        home="lorafleet.cli.chat",
        streams=True,
        examples=(
            "lorafleet chat --adapter reviews@prod",
            "lorafleet chat --model smollm2-135m --temperature 0.7 --system-prompt 'Answer in one sentence.'",
            "lorafleet chat --adapter runs/first --json < questions.txt",
        ),
    ),
    Command(
        "merge",
        "merge",
        "Fold an adapter into its base, write the model, and check it by its logits.",
        (ModelConfig, AdapterConfig, RegistryConfig, MergeConfig),
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
    home="lorafleet.cli.quickstart",
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


GROUPS = {
    "data": ("Look at data.", (DATA_INSPECT,)),
    "adapters": ("Keep adapters: names, versions, aliases, lineage, scores.", ADAPTERS),
}
"""Commands of two words, by the first."""

EVERY = {f"lorafleet {command.name}": command for command in (*COMMANDS, QUICKSTART)}
EVERY |= {f"lorafleet {name} {one.name}": one for name, (_, members) in GROUPS.items() for one in members}
"""All commands by their words."""


def _click_group() -> click.Group:
    groups = [
        click.Group(name, [click_command(one, f"lorafleet {name}") for one in commands], help=what, short_help=what)
        for name, (what, commands) in GROUPS.items()
    ]
    group = click.Group(
        "lorafleet",
        [*(click_command(command) for command in (*COMMANDS, QUICKSTART)), *groups],
        help="Train, keep and use LoRA adapters, one or many on one frozen base.",
        epilog="lorafleet COMMAND --help shows a command's flags; docs/cli.md lists all of them.",
        context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
    )
    return click.version_option(lorafleet.__version__, message="lorafleet %(version)s")(group)


app = _click_group()
