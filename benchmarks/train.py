"""``python -m benchmarks.train``: one LoRA training step, here and in PEFT + Trainer and TRL.

Two phases. Parity: identical batches in a fixed order, from the same adapter; the losses have to agree. Throughput:
the same rows, each peer with its own batching at its best, in rounds that go through all peers in turn. Every run is
a process of its own. Results go to stdout and into a JSON file, progress to stderr.
"""

import datetime
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from benchmarks.job import Job, Result, write_json
from benchmarks.machine import machine_facts
from benchmarks.process import BenchmarkError, run_module
from benchmarks.rows import Row, length_grouped, shuffled, tokenized_rows
from benchmarks.summary import (
    OURS,
    PARITY_LIMIT,
    Parity,
    Run,
    as_json,
    compare_losses,
    render,
    summarize_bare,
    summarize_peer,
    summarize_run,
    warnings,
)
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.errors import DataError, LorafleetError, MissingExtraError
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import inject_lora
from lorafleet.models.load import load_base

PEERS = {OURS: "lorafleet_loop", "peft + Trainer": "peft_trainer", "TRL SFTTrainer": "trl_sft"}
BATCH_SIZE, LEARNING_RATE, LR_WARMUP_STEPS = 8, 2e-4, 2


@dataclass(frozen=True)
class Plan:
    """What all runs of one benchmark share.

    Args:
        model: Folder of the base.
        adapter: Folder of the adapter that every peer starts from.
        rows: All tokenized rows.
        parity_steps: Steps of the parity phase; 0 leaves it out.
        rounds: Rounds of the throughput phase.
        steps: Timed steps of a run.
        skipped: Untimed steps before them.
        threads: CPU threads of every peer.
        seed: Of the choice and order of rows.
    """

    model: str
    adapter: str
    rows: list[Row]
    parity_steps: int
    rounds: int
    steps: int
    skipped: int
    threads: int
    seed: int

    def parity_job(self) -> Job:
        """Identical batches for every peer."""
        rows = shuffled(self.rows, self.parity_steps * BATCH_SIZE, self.seed)
        return self._job("parity", rows, self.parity_steps, skipped=0)

    def throughput_job(self, number: int, peer: str) -> Job:
        """The rows of a round; lorafleet's run also measures the matrix products."""
        steps = self.skipped + self.steps
        rows = length_grouped(self.rows, BATCH_SIZE, steps, self.seed + number)
        return self._job("throughput", rows, steps, skipped=self.skipped, products=peer == OURS)

    def _job(self, phase: Any, rows: list[Row], steps: int, *, skipped: int, products: bool = False) -> Job:
        return Job(
            phase=phase,
            model=self.model,
            adapter=self.adapter,
            rows=rows,
            batch_size=BATCH_SIZE,
            steps=steps,
            skipped=skipped,
            learning_rate=LEARNING_RATE,
            warmup_steps=LR_WARMUP_STEPS,
            threads=self.threads,
            seed=self.seed,
            products=products,
        )


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Rows, for example E2E NLG's train.jsonl.")
@click.option("--model", default="smollm2-135m", help="The base, as lorafleet train takes it.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="3 or more for figures to quote.")
@click.option(
    "--steps", type=click.IntRange(1), default=8, help="Timed steps of a run; 8 or more for figures to quote."
)
@click.option("--warmup", "skipped", type=click.IntRange(0), default=2, help="Untimed steps before them.")
@click.option("--parity-steps", type=click.IntRange(0), default=20, help="0 leaves the parity phase out.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads of every peer.")
@click.option("--seed", type=click.IntRange(0), default=42, help="Of the choice and order of rows.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/train.json"))
def main(data: Path, model: str, output: Path, **numbers: int) -> None:
    """Parse, measure, print."""
    try:
        require_peers()
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            report = benchmark(data, model, Path(folder), output, **numbers)
    except LorafleetError as error:
        click.echo(f"benchmarks.train: {error}", err=True)
        sys.exit(1)
    click.echo(f"wrote {report}", err=True)


def benchmark(data: Path, model: str, folder: Path, output: Path, **numbers: int) -> Path:
    """Run both phases, print the results and write them as JSON.

    Raises:
        BenchmarkError: A peer failed, or the losses differ.
        LorafleetError: The model or the rows cannot be used.
    """
    plan = Plan(**_prepare(data, model, folder), **numbers)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.train", *map(_short, sys.argv[1:])]),
        "finished": "",
        "machine": machine_facts(),
        "settings": {
            "model": _short(model),
            "data": data.name,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
        }
        | {"lr_warmup_steps": LR_WARMUP_STEPS, "lora": LoraConfig().model_dump(mode="json"), **numbers},
    }
    console = Console(width=None if sys.stdout.isatty() else 140)
    if plan.parity_steps:
        parity = check_parity(plan, folder)
        report["parity"] = asdict(parity) | {"limit": PARITY_LIMIT, "passed": parity.passed}
        _print_parity(console, parity)
    rounds = [run_round(plan, number, folder) for number in range(plan.rounds)]
    summaries = {peer: summarize_peer(peer, rounds) for peer in PEERS}
    bare = summarize_bare(rounds, plan.skipped)
    report |= as_json(rounds, summaries, bare)
    report["warnings"] = warnings(rounds, plan.steps)
    report["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    console.print(render(summaries, bare, len(rounds)))
    _print_notes(console, rounds, report["warnings"])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    return output


def require_peers() -> None:
    """Check that the peers are installed, before anything is measured.

    Raises:
        MissingExtraError: They are not.
    """
    if find_spec("trl") is None:
        raise MissingExtraError("benchmarks.train", "bench")


def _short(argument: str) -> str:
    """A path to elsewhere as its last two parts: results are published, folders are nobody's business."""
    path = Path(argument)
    return "/".join(path.parts[-2:]) if path.is_absolute() or ".." in path.parts else argument


def _prepare(data: Path, model: str, folder: Path) -> dict[str, Any]:
    """Tokenize the rows once, and write the adapter that every peer starts from."""
    if not data.exists():
        raise DataError(
            f"--data {data} does not exist; name a file of rows, for example train.jsonl of the E2E NLG set"
        )
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu", dtype="float32"))
    tokenizer: PreTrainedTokenizerBase = base.tokenizer
    rows = tokenized_rows(str(data), tokenizer)
    config = LoraConfig()
    bank = inject_lora(base.model, config, seed=0)
    adapter = folder / "adapter"
    save_adapter(adapter, config, bank.state_dict(0), base_name=base.name, metadata={})
    tokens = [len(row["input_ids"]) for row in rows]
    click.echo(f"{len(rows)} rows, {sum(tokens) / len(rows):.0f} tokens each on average", err=True)
    return {"model": base.source, "adapter": str(adapter), "rows": rows}


def check_parity(plan: Plan, folder: Path) -> Parity:
    """Run the parity phase.

    Raises:
        BenchmarkError: The losses differ by more than ``PARITY_LIMIT``.
    """
    job = plan.parity_job()
    results = {peer: run_module(peer, PEERS[peer], job, folder, plan.threads)[0] for peer in PEERS}
    parity = compare_losses({peer: result["losses"] for peer, result in results.items()})
    if not parity.passed:
        differences = ", ".join(f"{peer} {value:.1e}" for peer, value in parity.relative.items())
        raise BenchmarkError(
            f"parity: losses differ from lorafleet's by more than {PARITY_LIMIT} relative: {differences}"
        )
    return parity


def run_round(plan: Plan, number: int, folder: Path) -> dict[str, Run]:
    """Run every peer once. Each round begins with another peer, so that none always has the machine at its best."""
    names = list(PEERS)
    order: Sequence[str] = names[number % len(names) :] + names[: number % len(names)]
    runs = {}
    for peer in order:
        result, other_load = run_module(peer, PEERS[peer], plan.throughput_job(number, peer), folder, plan.threads)
        run = runs[peer] = summarize_run(Result(**result), plan.skipped, other_load)
        click.echo(
            f"round {number + 1} of {plan.rounds}: {peer} {run.tokens_per_second:.0f} real tokens/s, "
            f"{run.peak_memory_bytes / 2**30:.2f} GiB; others used {other_load:.2f} cores",
            err=True,
        )
    return runs


def _print_parity(console: Console, parity: Parity) -> None:
    steps = len(parity.losses[OURS])
    for peer, value in parity.relative.items():
        console.print(f"parity: {steps} steps on identical batches, loss within {value:.1e} relative of {peer}")


def _print_notes(console: Console, rounds: list[dict[str, Run]], cautions: list[str]) -> None:
    for peer in PEERS:
        console.print(f"{peer}: {rounds[0][peer].result.settings}")
    for caution in cautions:
        console.print(f"not to be quoted: {caution}")


if __name__ == "__main__":
    main()
