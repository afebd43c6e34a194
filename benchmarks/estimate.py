"""``python -m benchmarks.estimate``: what ``lorafleet estimate`` predicts against what ``lorafleet train`` takes.

A grid of models, methods and batch sizes. Each cell is one run of ``lorafleet train`` as a user starts it, with
checkpoints and evaluations on the way; beside it stands what ``lorafleet estimate`` said before. Time is that of the
steps alone, the first left out, in which caches and allocator fill.
Besides the demo base there are models with random weights: a wider Llama, and a GPT-2, whose layers are of another
kind, stored in two precisions. Results go to stdout and into a JSON file.
"""

import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from benchmarks.job import write_json
from benchmarks.machine import machine_facts
from benchmarks.process import run_watched
from benchmarks.summary import QUIET
from lorafleet.config.model import ModelConfig
from lorafleet.errors import LorafleetError
from lorafleet.estimation.memory import CUDA_CONTEXT
from lorafleet.files.run_folder import METRICS
from lorafleet.models.load import load_tokenizer

METHODS = ("full", "lora:r=8", "lora:r=64", "dora:r=8", "bottleneck", "prefix", "ia3")
VOCABULARY = 49152
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 768,
    "n_layer": 8,
    "n_positions": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RANDOM: dict[str, PreTrainedConfig] = {
    "wide-llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2-bfloat16": GPT2Config(**_GPT2, dtype="bfloat16"),
}
"""The last one's files hold another precision than a CPU computes in, so that no file lies behind its weights."""


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(exists=True, resolve_path=True),
    required=True,
    help="Rows, for example the folder of E2E.",
)
@click.option("--steps", type=click.IntRange(2), default=6, help="Of each run.")
@click.option(
    "--batch-size", "batch_sizes", type=click.IntRange(1), multiple=True, default=(2, 8), help="Rows of a step."
)
@click.option("--method", "methods", multiple=True, default=METHODS, help="What is trained.")
@click.option("--model", "models", multiple=True, default=("smollm2-135m", *RANDOM), help="The bases.")
@click.option("--device", default="auto", help="Where, as --device of train.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/estimate.json"))
def main(output: Path, **options: Any) -> None:
    """Parse, measure, print."""
    try:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            report = benchmark(Path(folder), output, **options)
    except LorafleetError as error:
        click.echo(f"benchmarks.estimate: {error}", err=True)
        sys.exit(1)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(report), *summary(report), sep="\n")
    click.echo(f"wrote {output}", err=True)


def benchmark(
    folder: Path,
    output: Path,
    data: str,
    steps: int,
    batch_sizes: tuple[int, ...],
    methods: tuple[str, ...],
    models: tuple[str, ...],
    device: str,
    threads: int,
) -> dict[str, Any]:
    """Predict and measure every cell; what is known is written after each.

    Raises:
        BenchmarkError: A process failed.
    """
    settings = {"data": Path(data).name, "steps": steps, "threads": threads}
    report: dict[str, Any] = {"machine": machine_facts(), "settings": settings, "cells": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    for model in models:
        place = _random_model(folder / model, RANDOM[model]) if model in RANDOM else model
        for size in batch_sizes:
            shared = [
                "--model",
                place,
                "--data",
                data,
                "--max-steps",
                str(steps),
                "--batch-size",
                str(size),
                "--device",
                device,
            ]
            for method in methods:
                # Just before each run, as this machine's speed changes from minute to minute.
                command = ["lorafleet", "estimate", *shared, "--methods", method, "--json"]
                predicted = json.loads(run_watched("lorafleet estimate", command, threads)[0])
                (one,) = predicted["methods"]
                if predicted["rates"]["device"].startswith("cuda"):  # PyTorch does not count what CUDA itself takes
                    one["memory"]["total"] -= CUDA_CONTEXT
                trained, others = _train(folder / "run", method, shared, steps, threads)
                cell = _cell(one, trained) | {"model": model, "method": method, "batch_size": size, "others": others}
                report["cells"].append(cell)
                report["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                write_json(output, report)
                click.echo(f"{model}, {method}, {size} rows: {_ratios(cell)}", err=True)
    return report


def _random_model(folder: Path, config: PreTrainedConfig) -> str:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(ModelConfig(model_name_or_path="smollm2-135m")).save_pretrained(folder)
    return str(folder)


def _train(folder: Path, method: str, shared: list[str], steps: int, threads: int) -> tuple[dict[str, Any], float]:
    command = ["lorafleet", "train", *shared, "--method", method, "--output-dir", str(folder), "--overwrite", "--json"]
    command += ["--max-eval-rows", "8", "--eval-strategy", "steps", "--eval-steps", str(steps // 2)]
    command += ["--num-threads", str(threads)]
    printed, _, others = run_watched(f"lorafleet train --method {method}", command, threads)
    lines = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    timed = [line for line in lines if line["event"] == "step"][1:]
    rate = sum(line["tokens"] for line in timed) / sum(line["seconds"] for line in timed)
    return json.loads(printed) | {"tokens_per_second": rate}, others


def _cell(predicted: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": [predicted["trainable_parameters"], trained["trainable_parameters"]],
        "memory": [predicted["memory"]["total"], trained["peak_memory_bytes"]],
        "seconds": [predicted["seconds"], trained["tokens"] / trained["tokens_per_second"]],
        "parts": predicted["memory"],
    }


def errors(report: dict[str, Any], what: str) -> list[float]:
    """How far each prediction is off, as a share of what was measured."""
    pairs = [cell[what] for cell in report["cells"]]
    return [abs(predicted / measured - 1) for predicted, measured in pairs]


def summary(report: dict[str, Any]) -> list[str]:
    """The median and the worst error, and why figures should not be quoted."""
    wrong = sum(one > 0 for one in errors(report, "parameters"))
    lines = [f"parameters: {'all exact' if not wrong else f'{wrong} wrong'}"]
    for what, name in (("memory", "peak memory"), ("seconds", "time")):
        off = errors(report, what)
        lines.append(f"{name}: off by {median(off):.1%} (median), {max(off):.1%} (worst)")
    busiest = max(cell["others"] for cell in report["cells"])
    if busiest > QUIET:
        lines.append(f"not to be quoted: other programs used up to {busiest:.1f} cores meanwhile")
    return lines


def _ratios(cell: dict[str, Any]) -> str:
    memory, seconds = (predicted / measured for predicted, measured in (cell["memory"], cell["seconds"]))
    return f"predicted over measured: memory {memory:.2f}, time {seconds:.2f}"


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"Predicted / measured, {report['settings']['steps']} steps; "
        f"matrix products reach {report['machine']['matmul_gflops']:.0f} GFLOP/s"
    )
    for column in ("model", "method", "rows", "trained parameters", "peak memory, GB", "ratio", "seconds", "ratio"):
        table.add_column(column)
    for cell in report["cells"]:
        cells = [cell["model"], cell["method"], str(cell["batch_size"])]
        cells.append(" / ".join(f"{one:,}" for one in dict.fromkeys(cell["parameters"])))
        for what, unit in (("memory", 1e9), ("seconds", 1)):
            predicted, measured = cell[what]
            cells += [f"{predicted / unit:.2f} / {measured / unit:.2f}", f"{predicted / measured:.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
