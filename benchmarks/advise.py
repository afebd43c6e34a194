"""``python -m benchmarks.advise``: what ``lorafleet advise`` says against the defaults, on real rows.

For each data set ``lorafleet train`` runs with the defaults and with the advice, on the same rows, for as many rows,
with several seeds. The loss on test rows, which neither has chosen by, is compared; a difference within the spread of
the seeds is noise. Results go to stdout and into a JSON file.
"""

import datetime
import json
import math
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
from benchmarks.process import run_watched
from lorafleet.config.training import TrainingConfig
from lorafleet.config.yaml_text import dump_mapping
from lorafleet.errors import LorafleetError

WAYS = ("defaults", "advice")
ROWS_OF_A_STEP = TrainingConfig().per_device_train_batch_size


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--data", "sets", type=click.Path(exists=True), multiple=True, required=True, help="Rows.")
@click.option("--model", default="smollm2-135m", help="The base.")
@click.option("--goal", default="quality", help="As --goal of advise.")
@click.option("--rows", type=click.IntRange(8), default=320, help="Rows that each run trains on, repeats counted.")
@click.option("--seeds", type=click.IntRange(2), default=2, help="Runs of each.")
@click.option("--eval-rows", type=click.IntRange(1), default=64, help="Held-out rows, and test rows.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/advise.json"))
def main(sets: tuple[str, ...], output: Path, **options: Any) -> None:
    """Parse, measure, print; what is known is written after each set, and other sets in the file stay."""
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"sets": {}}
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        for data in sets:
            with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
                found = _compare(str(Path(data).resolve()), Path(folder), **options)
            finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            made_by = {"machine": machine_facts(), "settings": options, "finished": finished}
            report["sets"][Path(data).name] = found | made_by
            write_json(output, report)
    except LorafleetError as error:
        click.echo(f"benchmarks.advise: {error}", err=True)
        sys.exit(1)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(report))
    configs = {json.dumps(one["config"], sort_keys=True) for one in report["sets"].values()}
    click.echo(f"{len(configs)} different configs for {len(report['sets'])} sets; wrote {output}")


def _compare(
    data: str, folder: Path, model: str, goal: str, rows: int, seeds: int, eval_rows: int, threads: int
) -> dict[str, Any]:
    steps = math.ceil(rows / ROWS_OF_A_STEP)
    base = ["--model", model, "--data", data]
    asked = ["lorafleet", "advise", *base, "--goal", goal, "--max-steps", str(steps), "--json"]
    choices = json.loads(run_watched("lorafleet advise", asked, threads)[0])["choices"]
    advice = {one["knob"]: one["value"] for one in choices}
    rows_of_a_step = advice["per_device_train_batch_size"] * advice.get("gradient_accumulation_steps", 1)
    knobs = {"defaults": {"max_steps": steps}, "advice": advice | {"max_steps": math.ceil(rows / rows_of_a_step)}}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(42, 42 + seeds):
        for way in WAYS:
            file = folder / f"{way}.yml"
            file.write_text(dump_mapping(knobs[way] | {"seed": seed}), encoding="utf-8")
            command = ["lorafleet", "train", str(file), *base, "--output-dir", str(folder / "run"), "--overwrite"]
            command += ["--max-eval-rows", str(eval_rows), "--num-threads", str(threads)]
            run_watched(f"lorafleet train, {way}", command, threads)
            command = ["lorafleet", "eval", "--adapter", str(folder / "run"), "--data", data, "--split", "test"]
            command += ["--max-rows", str(eval_rows), "--no-base", "--no-answers", "--json"]
            result = json.loads(run_watched(f"lorafleet eval, {way}", command, threads)[0])
            losses[way].append(result["metrics"]["adapter"]["loss"])
            click.echo(f"{Path(data).name}, seed {seed}, {way}: loss {losses[way][-1]:.4f}", err=True)
    return {"config": advice, "losses": losses}


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="loss on test rows, mean of the seeds")
    for column in (
        "set",
        "rows trained on",
        "seeds",
        "defaults",
        "advice",
        "difference",
        "spread of seeds",
        "the advice is",
    ):
        table.add_column(column)
    for name, one in report["sets"].items():
        losses, settings = one["losses"], one["settings"]
        means = [fmean(losses[way]) for way in WAYS]
        spread = max(max(losses[way]) - min(losses[way]) for way in WAYS)
        gain = means[1] - means[0]
        word = "no different" if abs(gain) <= spread else "better" if gain < 0 else "worse"
        counts = [str(settings[key]) for key in ("rows", "seeds")]
        table.add_row(name, *counts, f"{means[0]:.4f}", f"{means[1]:.4f}", f"{gain:+.4f}", f"{spread:.4f}", word)
    return table


if __name__ == "__main__":
    main()
