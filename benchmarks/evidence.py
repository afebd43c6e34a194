"""``python -m benchmarks.evidence``: the common rules of thumb, each knob moved by itself, on real rows.

For each data set one ``lorafleet tune`` trains all settings side by side, none stopped early, on the same rows in the
same order: the centre (r 8, alpha 16, learning rate 1e-3, all linear layers, no dropout), and settings that differ from
it in one knob. What is compared is the held-out loss at the end, by the mean of several seeds. Results go to stdout and
into a JSON file.
"""

import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.job import write_json
from benchmarks.machine import machine_facts
from benchmarks.process import run_watched
from lorafleet.errors import LorafleetError

CENTRE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 8,
}
MOVES: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-4, 2e-4, 5e-4, 2e-3, 4e-3),
    "r": (2, 32),
    "lora_alpha": (8, 32, 64),
    "lora_dropout": (0.1, 0.2),
    "target_modules": ("attention", "mlp"),
    "warmup_ratio": (0.1, 0.2),
    "weight_decay": (0.1,),
    "lr_scheduler_type": ("cosine", "constant"),
    "per_device_train_batch_size": (2, 4, 16, 32),
}


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--data", "sets", type=click.Path(exists=True), multiple=True, required=True, help="Rows.")
@click.option("--model", default="smollm2-135m", help="The base.")
@click.option(
    "--knob", "knobs", type=click.Choice(list(MOVES)), multiple=True, default=list(MOVES), help="What to move."
)
@click.option("--steps", type=click.IntRange(4), default=60, help="Of 8 rows; as many rows in steps of others.")
@click.option("--seeds", type=click.IntRange(1), default=2, help="Runs of each setting; 2 or more tell the spread.")
@click.option("--eval-rows", type=click.IntRange(1), default=100, help="Held-out rows.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/evidence.json"))
def main(sets: tuple[str, ...], knobs: tuple[str, ...], output: Path, **options: Any) -> None:
    """Parse, measure, print; sets that are in the file already stay."""
    moved = settings(knobs)
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"sets": {}, "names": list(moved)}
    if report["names"] != list(moved):
        raise click.BadParameter(f"{output} holds other settings; name another file", param_hint="--output")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        for data in sets:
            with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
                losses = _losses(data, Path(folder), list(moved.values()), **options)
            finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            made_by = {"machine": machine_facts(), "settings": options, "finished": finished}
            report["sets"][Path(data).name] = {"losses": losses, **made_by}
            write_json(output, report)
            click.echo(f"{data}: done", err=True)
    except LorafleetError as error:
        click.echo(f"benchmarks.evidence: {error}", err=True)
        sys.exit(1)
    Console(width=None if sys.stdout.isatty() else 160).print(table(report))
    click.echo(f"wrote {output}", err=True)


def settings(knobs: Sequence[str] = tuple(MOVES)) -> dict[str, dict[str, Any]]:
    """By name, the centre and every setting that has one of these knobs moved."""
    moves = {f"{knob} {value}": CENTRE | {knob: value} for knob in knobs for value in MOVES[knob]}
    return {"centre": CENTRE, **moves}


def _losses(
    data: str,
    folder: Path,
    moved: list[dict[str, Any]],
    model: str,
    steps: int,
    seeds: int,
    eval_rows: int,
    threads: int,
) -> list[list[float | None]]:
    """The loss of every seed of every setting, in their order; none where it became no number."""
    space = folder / "search.yml"
    space.write_text(json.dumps({"space": {"linked": [moved]}}), encoding="utf-8")
    command = ["lorafleet", "tune", str(space), "--model", model, "--data", str(Path(data).resolve()), "--no-pruning"]
    command += ["--output-dir", str(folder / "search"), "--max-steps", str(steps), "--seeds-per-trial", str(seeds)]
    command += ["--sampler", "grid", "--max-eval-rows", str(eval_rows), "--num-threads", str(threads), "--json"]
    printed, _, _ = run_watched("lorafleet tune", command, threads)
    found: dict[str, list[float | None]] = {}
    for trial in json.loads(printed)["trials"]:
        key = json.dumps([trial["settings"][name] for name in CENTRE])
        found[key] = [run["loss"] for run in trial["runs"].values()] if trial["runs"] else [None]
    return [found[json.dumps([one[name] for name in CENTRE])] for one in moved]


def table(report: dict[str, Any]) -> Table:
    """Each setting's loss less the centre's, by set; the spread of the centre's seeds beneath."""
    sets = {name: one["losses"] for name, one in report["sets"].items()}
    shown = Table(title="held-out loss less the centre's (below 0 is better); the centre's own loss on top")
    shown.add_column("setting")
    for name in sets:
        shown.add_column(name, justify="right")
    shown.add_column("mean", justify="right")
    centres = {name: _mean(losses[0]) for name, losses in sets.items()}
    shown.add_row("centre", *(f"{centre:.4f}" for centre in centres.values()), "")
    for number, setting in enumerate(report["names"][1:], start=1):
        differences = [_mean(losses[number]) - centres[name] for name, losses in sets.items()]
        shown.add_row(setting, *(f"{one:+.4f}" for one in differences), f"{fmean(differences):+.4f}")
    spreads = [max(one[0]) - min(one[0]) for one in sets.values()]
    shown.add_row("spread of seeds", *(f"{one:.4f}" for one in spreads), f"{fmean(spreads):.4f}")
    return shown


def _mean(losses: list[float | None]) -> float:
    return fmean(float("inf") if one is None else one for one in losses)


if __name__ == "__main__":
    main()
