"""``python -m benchmarks.population``: K adapters in one pass against the same K one after another.

Three ways to train the same adapters on the same rows: together in lorafleet, one after another in lorafleet, one after
another in PEFT + Trainer; the base is loaded once in each. Adapters have one row a step, of 32, 64 or 256 tokens: all
equally long, or from half to one and a half times that. The loss is on the data's answers, as in training. Every way
is a process of its own, in turn. Results go to stdout and into a JSON file, progress to stderr.
"""

import datetime
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.job import IGNORED, write_json
from benchmarks.machine import machine_facts
from benchmarks.process import BenchmarkError, run_module
from benchmarks.rows import Row, tokenized_rows
from benchmarks.summary import PARITY_LIMIT, QUIET, Spread, spread
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.errors import LorafleetError
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import inject_lora
from lorafleet.models.load import load_base

TOGETHER, ONE_BY_ONE, PEFT = "lorafleet, together", "lorafleet, one by one", "peft + Trainer, one by one"
WAYS = {TOGETHER: "population_lorafleet", ONE_BY_ONE: "population_lorafleet", PEFT: "population_peft"}
LEARNING_RATE = 2e-4
SMOKE = "{} rounds are a smoke test; quote 3 rounds or more"


@dataclass(frozen=True)
class Case:
    """Rows of one length for each adapter.

    Args:
        tokens: Of a row on average.
        equal: Whether all rows have as many.
        rows: Token ids and labels, by adapter and step.
    """

    tokens: int
    equal: bool
    rows: list[list[Row]]

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"{self.tokens} {'equal' if self.equal else 'ragged'}"

    def timed_tokens(self, skipped: int) -> int:
        """Tokens of the timed steps of all adapters."""
        return sum(len(row["input_ids"]) for rows in self.rows for row in rows[skipped:])

    @property
    def trained_share(self) -> float:
        """Which part of the tokens has a loss."""
        labels = np.concatenate([row["labels"] for rows in self.rows for row in rows])
        return float((labels != IGNORED).mean())


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m", help="The base, as lorafleet train takes it.")
@click.option("--data", default="sample:movie_polarity", help="Rows that these are cut from.")
@click.option("--adapters", type=click.IntRange(2), default=8, help="K.")
@click.option("--tokens", type=click.IntRange(4), multiple=True, default=(32, 64, 256), help="Of a row.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="3 or more for figures to quote.")
@click.option("--steps", type=click.IntRange(1), default=4, help="Timed steps of every adapter.")
@click.option("--warmup", "skipped", type=click.IntRange(1), default=1, help="Untimed steps before them.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/population.json"))
def main(model: str, data: str, output: Path, **numbers: Any) -> None:
    """Parse, measure, print."""
    try:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            benchmark(model, data, Path(folder), output, **numbers)
    except LorafleetError as error:
        click.echo(f"benchmarks.population: {error}", err=True)
        sys.exit(1)
    click.echo(f"wrote {output}", err=True)


def benchmark(model: str, data: str, folder: Path, output: Path, rounds: int, **numbers: Any) -> None:
    """Run all rounds, print the ratios and write them as JSON.

    Raises:
        BenchmarkError: A process failed, or the three ways have different losses.
        LorafleetError: The model or the text cannot be used.
    """
    job, cases = _prepare(model, data, folder, **numbers)
    facts = machine_facts()
    seconds: list[dict[str, list[float]]] = []
    busiest = 0.0
    for number in range(rounds):
        names = [*WAYS][number % 3 :] + [*WAYS][: number % 3]
        found, others = _round(names, job, folder)
        busiest = max(busiest, others)
        _check_losses(found, cases)
        seconds.append({way: [one["seconds"] for one in results] for way, results in found.items()})
        click.echo(f"round {number + 1} of {rounds} done; others used {others:.2f} cores", err=True)
    rates = [
        {way: [case.timed_tokens(job["skipped"]) / s for case, s in zip(cases, one[way], strict=True)] for way in WAYS}
        for one in seconds
    ]
    ratios = {way: [_ratio(rates, way, i) for i in range(len(cases))] for way in (ONE_BY_ONE, PEFT)}
    cautions = [SMOKE.format(rounds)] if rounds < 3 else []
    cautions += [f"other programs used up to {busiest:.1f} cores meanwhile"] if busiest > QUIET else []
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(cases, rates, ratios, len(job["cases"][0]["rows"])))
    console.print(f"matrix products reach {facts['matmul_gflops']:.0f} GFLOP/s")
    for caution in cautions:
        console.print(f"not to be quoted: {caution}")
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "settings": {
            "model": model,
            "data": Path(data).name,
            "rounds": rounds,
            "lora": LoraConfig().model_dump(mode="json"),
        }
        | {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()},
        "cases": [case.name for case in cases],
        "trained_share": [case.trained_share for case in cases],
        "tokens_per_second": rates,
        "together_is_faster": {way: [asdict(one) for one in found] for way, found in ratios.items()},
        "warnings": cautions,
    }
    write_json(output, report)


def _prepare(
    model: str, data: str, folder: Path, adapters: int, tokens: tuple[int, ...], steps: int, skipped: int, threads: int
) -> tuple[dict[str, Any], list[Case]]:
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu", dtype="float32"))
    rows = tokenized_rows(data, base.tokenizer)
    config = LoraConfig()
    bank = inject_lora(base.model, config, seed=0)
    save_adapter(folder / "adapter", config, bank.state_dict(0), base_name=base.name, metadata={})
    cases = [_case(rows, length, equal, adapters, skipped + steps) for length in tokens for equal in (True, False)]
    job = {
        "model": base.source,
        "adapter": str(folder / "adapter"),
        "cases": [{"rows": case.rows} for case in cases],
        "skipped": skipped,
        "threads": threads,
        "learning_rate": LEARNING_RATE,
    }
    return job, cases


def _case(data: list[Row], tokens: int, equal: bool, adapters: int, steps: int) -> Case:
    """The last tokens before the end of a row, of as many rows as that takes.

    Of ragged ones as many are longer as are shorter, by as much, so that the mean stays.
    """
    random = np.random.default_rng(tokens)
    lengths = np.full((adapters, steps), tokens)
    if not equal:
        extra = random.integers(0, tokens // 2 + 1, (adapters // 2, steps))
        lengths[: adapters // 2] += extra
        lengths[adapters - adapters // 2 :] -= extra
        lengths = random.permuted(lengths, axis=0)
    text = {name: [number for row in data for number in row[name]] for name in ("input_ids", "labels")}
    ends = np.cumsum([len(row["input_ids"]) for row in data])
    chosen = random.choice(ends[ends >= 2 * tokens], (adapters, steps))
    rows = [
        [{name: numbers[stop - n : stop] for name, numbers in text.items()} for stop, n in zip(*one, strict=True)]
        for one in zip(chosen, lengths, strict=True)
    ]
    return Case(tokens, equal, rows)


def _round(names: list[str], job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], float]:
    found, busiest = {}, 0.0
    for way in names:
        told = job | {"together": way == TOGETHER}
        found[way], others = run_module(way, WAYS[way], told, folder, job["threads"])
        busiest = max(busiest, others)
    return found, busiest


def _check_losses(found: dict[str, Any], cases: list[Case]) -> None:
    """All three ways train the same."""
    for number, case in enumerate(cases):
        ours = found[TOGETHER][number]["losses"]
        for way in (ONE_BY_ONE, PEFT):
            difference = max(abs(a - b) / abs(b) for a, b in zip(ours, found[way][number]["losses"], strict=True))
            if not difference <= PARITY_LIMIT:
                raise BenchmarkError(f"{case.name}: losses of {way} differ by {difference:.1e} relative")


def _ratio(rates: list[dict[str, list[float]]], way: str, case: int) -> Spread:
    return spread([one[TOGETHER][case] / one[way][case] for one in rates])


def _table(
    cases: list[Case], rates: list[dict[str, list[float]]], ratios: dict[str, list[Spread]], adapters: int
) -> Table:
    table = Table(title=f"{adapters} adapters: tokens/s, and how much faster together; median of {len(rates)} rounds")
    table.add_column("tokens of an adapter-step")
    table.add_column("with a loss", justify="right")
    for name in (*WAYS, "together × one by one", "together × peft + Trainer"):
        table.add_column(name, justify="right")
    for number, case in enumerate(cases):
        own = (spread([one[way][number] for one in rates]).text(0) for way in WAYS)
        table.add_row(
            case.name,
            f"{case.trained_share:.0%}",
            *own,
            ratios[ONE_BY_ONE][number].text(2),
            ratios[PEFT][number].text(2),
        )
    return table


if __name__ == "__main__":
    main()
