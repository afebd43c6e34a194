"""``python -m benchmarks.switch``: adapters switched and mixed at run time.

Decoding of batches that mix adapters, in lorafleet's pool and by PEFT's ``adapter_names``, beside the base alone in the
pool and in transformers' ``generate``; the first token after a switch; an adapter from disk against a plain read of its
tensors; and many registered adapters of which few are resident. Greedy, all answers equally long, prompts cut from the
data. Each way is a process of its own, in turn. Results go to stdout and into a JSON file, progress to stderr.
"""

import datetime
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.job import write_json
from benchmarks.machine import machine_facts
from benchmarks.process import run_module
from benchmarks.rows import tokenized_rows
from benchmarks.summary import QUIET, Spread, spread
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.errors import LorafleetError
from lorafleet.files.adapter import save_adapter
from lorafleet.lora import inject_lora
from lorafleet.models.load import load_base
from lorafleet.models.machine import pick_device, pick_dtype
from lorafleet.registry.registry import Registry

OURS, PEFT = "lorafleet", "peft"
WAYS = {OURS: "switch_lorafleet", PEFT: "switch_peft"}
CASES = ((0, 1), (0, 8), (0, 32), (1, 8), (8, 8), (8, 32), (32, 32))
"""Adapters (none for the base alone) and rows of a batch."""

_DIFFERENT = 32


@click.command(help=(__doc__ or "").partition("\n\n")[2], context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m", help="The base, as lorafleet train takes it.")
@click.option("--data", default="sample:movie_polarity", help="Rows that prompts are cut from.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="3 or more for figures to quote.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, help="Of a prompt.")
@click.option("--new-tokens", type=click.IntRange(2), default=32, help="Of an answer.")
@click.option("--registered", type=click.IntRange(1), default=1000, help="Adapters in the registry.")
@click.option("--resident", type=click.IntRange(32), default=64, help="Adapters in memory.")
@click.option("--requests", type=click.IntRange(20), default=150, help="Over the registered adapters.")
@click.option("--device", default="cpu", help="Where, as --device of train; the precision follows from it.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="CPU threads.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/switch.json"))
def main(model: str, data: str, output: Path, rounds: int, **options: Any) -> None:
    """Parse, measure, print."""
    try:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            benchmark(model, data, Path(folder), output, rounds, **options)
    except LorafleetError as error:
        click.echo(f"benchmarks.switch: {error}", err=True)
        sys.exit(1)
    click.echo(f"wrote {output}", err=True)


def benchmark(model: str, data: str, folder: Path, output: Path, rounds: int, **options: Any) -> None:
    """Run all rounds, print the ratios and write them as JSON.

    Raises:
        BenchmarkError: A process failed.
        LorafleetError: The model or the text cannot be used.
    """
    job = _prepare(model, data, folder, **options)
    facts, busiest, found = machine_facts(), 0.0, list[dict[str, Any]]()
    for number in range(rounds):
        one = {}
        for way in [*WAYS][:: 1 if number % 2 else -1]:
            one[way], others = run_module(way, WAYS[way], job, folder, job["threads"])
            busiest = max(busiest, others)
        found.append(one)
        click.echo(f"round {number + 1} of {rounds} done; others used {busiest:.2f} cores", err=True)
    cautions = [f"{rounds} rounds are a smoke test; quote 3 rounds or more"] if rounds < 3 else []
    cautions += [f"other programs used up to {busiest:.1f} cores meanwhile"] if busiest > QUIET else []
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(found))
    facts_of_pool = _pool_facts(found)
    for line in _lines(facts_of_pool, job):
        console.print(line)
    console.print(f"matrix products reach {facts['matmul_gflops']:.0f} GFLOP/s")
    for caution in cautions:
        console.print(f"not to be quoted: {caution}")
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "settings": {"model": model, "data": Path(data).name, "rounds": rounds, **options, "dtype": job["dtype"]},
        "cases": CASES,
        "tokens_per_second": {way: [[c["rate"] for c in one[way]["decode"]] for one in found] for way in WAYS},
        "equal_rows": _equal_rows(found[0]),
        "pool": {name: asdict(value) for name, value in facts_of_pool.items()},
        "many": [one[OURS]["many"] for one in found],
        "warnings": cautions,
    }
    write_json(output, report)


def _prepare(
    model: str,
    data: str,
    folder: Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    registered: int,
    resident: int,
    requests: int,
    device: str,
    threads: int,
) -> dict[str, Any]:
    place = pick_device(device)
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu", dtype="float32"))
    text = [token for row in tokenized_rows(data, base.tokenizer) for token in row["input_ids"]]
    most = max(batch for _, batch in CASES)
    prompts = [text[i * prompt_tokens : (i + 1) * prompt_tokens] for i in range(most)]
    config, adapters = LoraConfig(), []
    bank = inject_lora(base.model, config)
    random = torch.Generator().manual_seed(0)
    for number in range(_DIFFERENT):
        for parameter in bank.slot_parameters(0).values():
            parameter.value.normal_(std=0.02, generator=random)
        adapters.append(str(folder / f"adapter-{number}"))
        save_adapter(adapters[-1], config, bank.state_dict(0), base_name=base.name, metadata={})
    registry, one = str(folder / "registry"), folder / "one"
    opened = Registry(registry, create=True)
    shutil.copytree(adapters[0], one)
    for number in range(registered):
        # Another revision each time, by its metadata; the weights are stored once and read anew for each.
        manifest = one / "lorafleet.json"
        told = json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps({**told, "metadata": {"steps": number}}), encoding="utf-8")
        opened.add(one, f"many-{number}", scores={})
    click.echo(f"{registered} adapters registered", err=True)
    return {
        "model": base.source,
        "device": str(place),
        "dtype": str(pick_dtype("auto", place)).removeprefix("torch."),
        "adapters": adapters,
        "registry": registry,
        "prompts": prompts,
        "cases": CASES,
        "new_tokens": new_tokens,
        "resident": resident,
        "registered": registered,
        "requests": requests,
        "threads": threads,
    }


def _equal_rows(one: dict[str, Any]) -> list[list[int]]:
    """Of each case how many rows both ways answered with the same tokens, and how many there were."""
    pairs = zip(one[OURS]["decode"], one[PEFT]["decode"], strict=True)
    return [[sum(a == b for a, b in zip(x["tokens"], y["tokens"], strict=True)), len(x["tokens"])] for x, y in pairs]


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(title=f"tokens/s of decoding, median of {len(found)} rounds")
    for name in ("adapters", "rows", "lorafleet", "peft, or generate for the base", "lorafleet × it"):
        table.add_column(name, justify="right")
    table.add_column("× our base alone", justify="right")
    table.add_column("same tokens", justify="right")
    rates = {way: [[case["rate"] for case in one[way]["decode"]] for one in found] for way in WAYS}
    for number, ((adapters, rows), (equal, total)) in enumerate(zip(CASES, _equal_rows(found[0]), strict=True)):
        base = CASES.index((0, rows))
        own = [one[number] for one in rates[OURS]]
        table.add_row(
            str(adapters or "base"),
            str(rows),
            spread(own).text(0),
            spread([one[number] for one in rates[PEFT]]).text(0),
            spread([a[number] / b[number] for a, b in zip(rates[OURS], rates[PEFT], strict=True)]).text(2),
            spread([one[number] / one[base] for one in rates[OURS]]).text(2) if adapters else "",
            f"{equal} of {total}",
        )
    return table


def _pool_facts(found: list[dict[str, Any]]) -> dict[str, Spread]:
    ours = [one[OURS] for one in found]
    return {
        "first_token_after_switch": spread([one["switch"] for one in ours]),
        "load_over_raw_read": spread([one["load"]["seconds"] / one["load"]["raw_seconds"] for one in ours]),
        "miss_over_hit": spread([one["many"]["miss_seconds"] / one["many"]["hit_seconds"] for one in ours]),
        "memory_over_files": spread([one["many"]["added_bytes"] / one["many"]["resident_bytes"] for one in ours]),
    }


def _lines(facts: dict[str, Spread], job: dict[str, Any]) -> list[str]:
    return [
        f"first token after a switch between residents: {facts['first_token_after_switch'].text(3)} × without a switch",
        f"an adapter from disk into its slot: {facts['load_over_raw_read'].text(2)} × a plain read of its tensors",
        f"{job['registered']} registered, {job['resident']} resident: the first token of one that has to be loaded "
        f"takes {facts['miss_over_hit'].text(2)} × that of a resident",
        f"memory since the pool was empty, the cache included: {facts['memory_over_files'].text(2)} × the files of its "
        "residents",
    ]


if __name__ == "__main__":
    main()
