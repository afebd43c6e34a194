"""``python -m benchmarks.full``: full fine-tuning here against ``transformers.Trainer``, each at its best rate.

Both start from the same base and train on the same rows in the same order, with the same learning rate, linear
schedule, warm-up, AdamW and clipping, at several rates and with several seeds, each an order of its own. What is
compared is the loss on the same held-out rows at the end, the mean of the seeds at the rate that suits each best.
Results go to stdout and into a JSON file.
"""

import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.job import write_json
from benchmarks.machine import machine_facts
from benchmarks.process import BenchmarkError, run_module, run_watched
from benchmarks.rows import labelled
from lorafleet.config.data import DataConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.data.batches import Schedule
from lorafleet.data.load import load_data
from lorafleet.data.store import sample
from lorafleet.errors import LorafleetError
from lorafleet.models.load import load_tokenizer
from lorafleet.models.source import find_source
from lorafleet.training.schedule import warmup_steps

WAYS = ("lorafleet", "transformers.Trainer")


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, resolve_path=True), required=True, help="With held-out rows.")
@click.option("--model", default="smollm2-135m", help="The base.")
@click.option("--steps", type=click.IntRange(4), default=40, help="Of 8 rows.")
@click.option("--rates", default="1e-5,3e-5,1e-4", help="Learning rates, with commas.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="Runs of each; 3 or more for figures to quote.")
@click.option("--eval-rows", type=click.IntRange(1), default=100, help="Held-out rows.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/full.json"))
def main(rates: str, output: Path, **options: Any) -> None:
    """Parse, measure, print."""
    try:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            report = benchmark(Path(folder), output, [float(rate) for rate in rates.split(",")], **options)
    except LorafleetError as error:
        click.echo(f"benchmarks.full: {error}", err=True)
        sys.exit(1)
    Console(width=None if sys.stdout.isatty() else 120).print(_table(report))
    if options["seeds"] < 3:
        click.echo(f"not to be quoted: {options['seeds']} seeds are a smoke test; quote 3 or more", err=True)
    click.echo(f"wrote {output}", err=True)


def benchmark(
    folder: Path,
    output: Path,
    rates: list[float],
    data: str,
    model: str,
    steps: int,
    seeds: int,
    eval_rows: int,
    threads: int,
) -> dict[str, Any]:
    """Train everything; what is known is written after each seed: by way and rate, the loss of every seed.

    Raises:
        BenchmarkError: A process failed, or there are too few rows.
    """
    config = ModelConfig(model_name_or_path=model)
    size = TrainingConfig().per_device_train_batch_size
    splits = load_data(DataConfig(data=data), load_tokenizer(config)).splits
    count = len(splits["train"])
    if steps * size > count:
        raise BenchmarkError(f"{steps} steps of {size} rows are more than the {count} of one pass; lower --steps")
    job = {
        "model": find_source(config).path,
        "eval_rows": [labelled(row) for row in sample(splits["valid"], eval_rows)],
        "rates": rates,
        "steps": steps,
        "warmup_steps": warmup_steps(TrainingConfig(), steps),
        "threads": threads,
    }
    found: dict[str, dict[str, list[float]]] = {way: {f"{rate:g}": [] for rate in rates} for way in WAYS}
    settings = {"data": Path(data).name, "model": model, "steps": steps, "eval_rows": eval_rows, "threads": threads}
    report: dict[str, Any] = {"machine": machine_facts(), "settings": settings, "losses": found}
    output.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = (found[way] for way in WAYS)
    command = ["lorafleet", "train", "--method", "full", "--model", model, "--data", data]
    command += ["--max-steps", str(steps), "--max-eval-rows", str(eval_rows), "--num-threads", str(threads), "--json"]
    command += ["--save-strategy", "no", "--eval-strategy", "no", "--output-dir", str(folder / "run"), "--overwrite"]
    for seed in range(42, 42 + seeds):
        for rate in rates:
            knobs = ["--seed", str(seed), "--learning-rate", str(rate)]
            ours[f"{rate:g}"].append(_held_out_loss([*command, *knobs], threads))
        schedule = Schedule(count, size, 1, seed)
        order = [i for step in range(steps) for batch in schedule.window(step) for i in batch]
        own = {"seed": seed, "rows": [labelled(splits["train"][i]) for i in order]}
        losses, _ = run_module(WAYS[1], "full_trainer", job | own, folder, threads)
        for rate, loss in zip(rates, losses, strict=True):
            theirs[f"{rate:g}"].append(loss)
        report["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(output, report)
        last = {way: [f"{losses[-1]:.4f}" for losses in found[way].values()] for way in WAYS}
        click.echo(f"seed {seed}: {last}", err=True)
    return report


def _held_out_loss(command: list[str], threads: int) -> float:
    printed, _, _ = run_watched(WAYS[0], command, threads)
    return float(json.loads(printed)["metrics"]["loss"])


def _table(report: dict[str, Any]) -> Table:
    ours, theirs = (report["losses"][way] for way in WAYS)
    table = Table(title=f"held-out loss after {report['settings']['steps']} steps, mean of the seeds (least–most)")
    for column in ("learning rate", *WAYS, "difference"):
        table.add_column(column, justify="right")
    best = [min(one, key=lambda rate: fmean(one[rate])) for one in (ours, theirs)]
    rows = [(rate, rate, rate) for rate in ours] + [(f"each at its best: {best[0]}, {best[1]}", *best)]
    for name, mine, others in rows:
        cells = [f"{fmean(one):.4f} ({min(one):.4f}–{max(one):.4f})" for one in (ours[mine], theirs[others])]
        table.add_row(name, *cells, f"{fmean(ours[mine]) - fmean(theirs[others]):+.4f}")
    return table


if __name__ == "__main__":
    main()
