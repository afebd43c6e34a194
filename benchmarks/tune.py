"""``python -m benchmarks.tune``: the classic grid of 16 settings, searched here and by a plain loop of trainers.

For each seed: ``lorafleet tune --space classic`` as a user runs it, timed from the outside, and the same without
stopping any trial, which tells the true loss of every setting. The plain loop is PEFT and Trainer for each setting on a
base that is loaded once; its time is measured on a few settings and scaled to all 16. Regret is what the search lost:
(winner - best) / (median - best), by the full grid's losses. Results go to stdout and into a JSON file.
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
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.job import write_json
from benchmarks.machine import machine_facts
from benchmarks.process import run_module, run_watched
from benchmarks.rows import labelled
from benchmarks.summary import QUIET
from lorafleet.config.data import DataConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.data.load import load_data
from lorafleet.data.store import sample
from lorafleet.errors import LorafleetError
from lorafleet.models.load import load_base
from lorafleet.search.presets import PRESETS
from lorafleet.training.schedule import warmup_steps

GRID = [{"r": r, "lora_alpha": alpha} for r in PRESETS["classic"]["r"] for alpha in PRESETS["classic"]["lora_alpha"]]


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(exists=True, resolve_path=True),
    required=True,
    help="Rows with held-out ones, for example the folder of E2E NLG.",
)
@click.option("--model", default="smollm2-135m", help="The base, as lorafleet takes it.")
@click.option("--steps", type=click.IntRange(4), default=48, help="Full budget of a setting, in steps of 8 rows.")
@click.option("--eval-rows", type=click.IntRange(1), default=64, help="Held-out rows.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="3 or more for figures to quote.")
@click.option(
    "--peer-settings", type=click.IntRange(1, 16), default=2, help="Settings that the plain loop is timed on."
)
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/tune.json"))
def main(output: Path, **options: Any) -> None:
    """Parse, measure, print."""
    try:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            report = benchmark(Path(folder), output, **options)
    except LorafleetError as error:
        click.echo(f"benchmarks.tune: {error}", err=True)
        sys.exit(1)
    Console(width=None if sys.stdout.isatty() else 120).print(_table(report), *report["warnings"], sep="\n")
    click.echo(f"wrote {output}", err=True)


def benchmark(
    folder: Path, output: Path, data: str, model: str, seeds: int, peer_settings: int, **numbers: int
) -> dict[str, Any]:
    """Measure the plain loop, then the search and the full grid for each seed; what is known is written at each step.

    Raises:
        BenchmarkError: A process failed.
        LorafleetError: The model or the rows cannot be used.
    """
    facts = machine_facts()
    job = _peer_job(data, model, peer_settings, **numbers)
    peer, others = run_module("peft + Trainer", "tune_peft", job, folder, numbers["threads"])
    loop_seconds = sum(one["seconds"] for one in peer) * len(GRID) / len(peer)
    report: dict[str, Any] = {
        "machine": facts,
        "settings": {"data": Path(data).name, "model": model, "grid": GRID, **numbers},
        "plain_loop": {"seconds": loop_seconds, "measured": peer},
        "seeds": [],
    }
    click.echo(f"plain loop: {loop_seconds:.0f} s for {len(GRID)} settings, scaled from {len(peer)}", err=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(42, 42 + seeds):
        search, seconds, other_load = _tune(folder / f"search-{seed}", data, job["model"], seed, **numbers)
        grid, grid_seconds, _ = _tune(folder / f"grid-{seed}", data, job["model"], seed, "--no-pruning", **numbers)
        others = max(others, other_load)
        losses = {one["number"]: one["values"][0] for one in grid["trials"]}
        best, middle = min(losses.values()), median(losses.values())
        one = {
            "seed": seed,
            "seconds": seconds,
            "grid_seconds": grid_seconds,
            "tokens": search["tokens"],
            "full_tokens": search["full_tokens"],
            "winner": search["best_settings"],
            "regret": (losses[search["best_trial"]] - best) / (middle - best),
            "losses": losses,
        }
        report["seeds"].append(one)
        report["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report["warnings"] = _warnings(len(report["seeds"]), others)
        write_json(output, report)
        click.echo(
            f"seed {seed}: {seconds:.0f} s, {loop_seconds / seconds:.1f} times, regret {one['regret']:.3f}", err=True
        )
    return report


def _warnings(seeds: int, others: float) -> list[str]:
    found = [f"{seeds} seeds are a smoke test; quote 3 or more"] if seeds < 3 else []
    found += [f"other programs used up to {others:.1f} cores meanwhile"] if others > QUIET else []
    return [f"not to be quoted: {one}" for one in found]


def _peer_job(data: str, model: str, peer_settings: int, steps: int, eval_rows: int, threads: int) -> dict[str, Any]:
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu", dtype="float32"))
    splits = load_data(DataConfig(data=data), base.tokenizer).splits
    training = TrainingConfig()
    places = np.linspace(0, len(GRID) - 1, peer_settings).round().astype(int)
    return {
        "model": base.source,
        "rows": [labelled(splits["train"][i]) for i in range(8 * steps)],
        "eval_rows": [labelled(row) for row in sample(splits["valid"], eval_rows)],
        "settings": [GRID[i] for i in places],
        "steps": steps,
        "learning_rate": training.learning_rate,
        "warmup_steps": warmup_steps(training, steps),
        "seed": training.seed,
        "threads": threads,
    }


def _tune(
    folder: Path, data: str, model: str, seed: int, *flags: str, steps: int, eval_rows: int, threads: int
) -> tuple[dict[str, Any], float, float]:
    """The command's result, how long it took from start to end, and the load of others meanwhile."""
    command = ["lorafleet", "tune", "--space", "classic", "--model", model, "--data", data]
    command += ["--output-dir", str(folder), "--max-steps", str(steps), "--max-eval-rows", str(eval_rows)]
    command += ["--seed", str(seed), "--num-threads", str(threads), "--json", *flags]
    printed, seconds, others = run_watched("lorafleet tune", command, threads)
    return json.loads(printed), seconds, others


def _table(report: dict[str, Any]) -> Table:
    loop = report["plain_loop"]["seconds"]
    table = Table(
        title=f"{len(GRID)} settings, {report['settings']['steps']} steps each; a plain loop takes {loop:.0f} s; "
        f"matrix products reach {report['machine']['matmul_gflops']:.0f} GFLOP/s"
    )
    for column in ("seed", "seconds", "× faster", "tokens", "regret", "winner", "loss best / median / worst"):
        table.add_column(column)
    for one in report["seeds"]:
        losses = sorted(one["losses"].values())
        spread = f"{losses[0]:.4f} / {median(losses):.4f} / {losses[-1]:.4f}"
        tokens = f"{one['tokens'] / one['full_tokens']:.0%}"
        winner = ", ".join(f"{name} {value:g}" for name, value in one["winner"].items())
        cells = (
            f"{one['seconds']:.0f}",
            f"{loop / one['seconds']:.1f}",
            tokens,
            f"{one['regret']:.3f}",
            winner,
            spread,
        )
        table.add_row(str(one["seed"]), *cells)
    return table


if __name__ == "__main__":
    main()
