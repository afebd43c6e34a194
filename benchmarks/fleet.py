"""``python -m benchmarks.fleet``: an adapter for each of many users, together here and by a plain loop of trainers.

``lorafleet.fleet`` on a file of users against a loop of get_peft_model, Trainer and save for each user, on a base that
is loaded once: time of training, memory, and disk of what is kept. All users take the same number of steps on their own
rows, without evaluation. The loop is timed on a few users and scaled. Results go to stdout and into a JSON file,
progress to stderr.
"""

import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.job import write_json
from benchmarks.machine import machine_facts
from benchmarks.process import run_module
from benchmarks.rows import tokenized_rows
from benchmarks.summary import QUIET
from lorafleet.config.fleet import UsersConfig
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import TrainingConfig
from lorafleet.errors import LorafleetError
from lorafleet.fleets.users import split_users
from lorafleet.models.load import Base, load_base
from lorafleet.training.schedule import warmup_steps


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, resolve_path=True), required=True, help="Rows with a user.")
@click.option("--key", default="user", help="The field that says whose a row is.")
@click.option("--model", default="smollm2-135m", help="The base, as lorafleet takes it.")
@click.option("--users", type=click.IntRange(2), default=64, help="At most.")
@click.option("--steps", type=click.IntRange(1), default=4, help="Of each user.")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Rows of a step.")
@click.option("--longest", type=click.IntRange(4), help="Leave out rows with more tokens.")
@click.option("--peer-users", type=click.IntRange(2), default=4, help="Users that the plain loop is timed on.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="3 or more for figures to quote.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/fleet.json"))
def main(output: Path, rounds: int, **options: Any) -> None:
    """Parse, measure, print."""
    try:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            benchmark(Path(folder), output, rounds, **options)
    except LorafleetError as error:
        click.echo(f"benchmarks.fleet: {error}", err=True)
        sys.exit(1)
    click.echo(f"wrote {output}", err=True)


def benchmark(folder: Path, output: Path, rounds: int, threads: int, **options: Any) -> None:
    """Run both ways in turn, print the ratios and write them.

    Raises:
        BenchmarkError: A process failed.
        LorafleetError: The model or the rows cannot be used.
    """
    facts, found, busiest = machine_facts(), list[dict[str, Any]](), 0.0
    fleet, peer, users = _prepare(folder, **options)
    for number in range(rounds):
        own = {"output_dir": str(folder / f"run-{number}"), "registry": str(folder / f"registry-{number}")}
        jobs = {"fleet_lorafleet": {"fleet": fleet | own}, "fleet_peft": peer}
        one: dict[str, Any] = {}
        for module in [*jobs][:: 1 if number % 2 else -1]:
            one[module], others = run_module(module, module, jobs[module] | {"threads": threads}, folder, threads)
            busiest = max(busiest, others)
        # What a process does but once is in the first user's seconds, and not in those of all the others.
        first, *rest = one["fleet_peft"]["seconds"]
        loop = first + sum(rest) / len(rest) * (users - 1)
        found.append(one | {"loop_seconds": loop, "faster": loop / one["fleet_lorafleet"]["seconds"]})
        click.echo(f"round {number + 1} of {rounds}: {found[-1]['faster']:.2f} times; others {busiest:.2f}", err=True)
    cautions = [f"{rounds} rounds are a smoke test; quote 3 rounds or more"] if rounds < 3 else []
    cautions += [f"other programs used up to {busiest:.1f} cores meanwhile"] if busiest > QUIET else []
    Console(width=None if sys.stdout.isatty() else 120).print(
        *_lines(found, users, len(peer["users"])),
        f"matrix products reach {facts['matmul_gflops']:.0f} GFLOP/s",
        *(f"not to be quoted: {caution}" for caution in cautions),
        sep="\n",
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "settings": {**options, "data": Path(options["data"]).name, "users": users},
        "rounds": found,
        "warnings": cautions,
    }
    write_json(output, report)


def _prepare(
    folder: Path,
    data: str,
    key: str,
    model: str,
    users: int,
    steps: int,
    batch_size: int,
    longest: int | None,
    peer_users: int,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The fleet's knobs, the loop's job, and how many users there are."""
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu", dtype="float32"))
    training, lora = TrainingConfig(), LoraConfig()
    if longest is not None:
        data = str(_shorter(data, base, longest, folder / "short.jsonl"))
    config = UsersConfig(data=data, key=key, max_users=users)
    split = split_users(config, folder / "split", training.seed)
    names = list(split.folders)
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(peer_users, len(names))).round().astype(int)]
    peer = {
        "model": base.source,
        "lora": {"r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout},
        "users": [tokenized_rows(str(split.folders[name]), base.tokenizer) for name in chosen],
        "batch_size": batch_size,
        "steps": steps,
        "learning_rate": training.learning_rate,
        "warmup_steps": warmup_steps(training, steps),
        "seed": training.seed,
    }
    defaults = {"max_steps": steps, "per_device_train_batch_size": batch_size}
    fleet = {
        "model": base.source,
        "device": "cpu",
        "dtype": "float32",
        "shared": "none",
        "max_eval_rows": 1,
        "defaults": defaults,
        "users": config.model_dump(),
    }
    return fleet, peer, len(names)


def _shorter(data: str, base: Base, longest: int, path: Path) -> Path:
    """The training rows with few tokens, as a file of their own."""
    source = Path(data, "train.jsonl") if Path(data).is_dir() else Path(data)
    lines = source.read_text(encoding="utf-8").splitlines()
    rows = tokenized_rows(str(source), base.tokenizer)
    kept = [line for line, row in zip(lines, rows, strict=True) if len(row["input_ids"]) <= longest]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return path


def _lines(found: list[dict[str, Any]], users: int, timed: int) -> list[str]:
    ratios = sorted(one["faster"] for one in found)
    ours, loop = found[0]["fleet_lorafleet"], found[0]["fleet_peft"]
    each = sum(loop["disk_bytes"]) / len(loop["disk_bytes"])
    return [
        f"{users} users, {ours['population_size']} at a time: {ratios[len(ratios) // 2]:.2f} times as fast "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f}) as the plain loop, which was timed on {timed} users",
        f"{ours['tokens'] / ours['steps']:.0f} tokens a step",
        f"disk of a user: {ours['weight_bytes'] / users:,.0f} bytes of weights and {ours['own_bytes'] / users:,.0f} "
        f"beside them in the registry; {ours['common_bytes']:,} bytes are common to all; the run's folder adds "
        f"{ours['run_bytes'] / users:,.0f} (what was measured); the loop keeps {each:,.0f} for each",
        f"most memory: {ours['peak_memory_bytes'] / 1e9:.2f} GB, the loop {loop['peak_memory_bytes'] / 1e9:.2f} GB",
    ]


if __name__ == "__main__":
    main()
