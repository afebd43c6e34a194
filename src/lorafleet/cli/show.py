"""How the result of each command is shown to people, on stdout."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from lorafleet.cli.quickstart import KNOBS, REVIEWS
from lorafleet.cli.tables import clock, comparison, facts, put, share, size
from lorafleet.evaluation.metrics import in_figures
from lorafleet.search.space import in_words

if TYPE_CHECKING:
    from lorafleet.advice.run import Advice
    from lorafleet.cli.chat import ChatResult
    from lorafleet.cli.quickstart import QuickstartResult
    from lorafleet.comparison.result import CompareResult
    from lorafleet.data.report import DataReport
    from lorafleet.estimation.result import Estimate, MethodEstimate
    from lorafleet.evaluation.run import EvalResult
    from lorafleet.export.merged import MergeResult
    from lorafleet.files.inspection import Inspection
    from lorafleet.fleets.result import FleetResult
    from lorafleet.generation.run import GenerateResult
    from lorafleet.search.result import TuneResult
    from lorafleet.training.result import TrainResult


def train(result: "TrainResult") -> None:
    """The base beside the adapter, then what was trained and what to do next."""
    rows = ", ".join(f"{count:,} {name}" for name, count in result.rows.items())
    what = "model" if result.method == "full" else "adapter"
    put(
        comparison({"base": result.metrics_before, what: result.metrics}),
        facts(
            [
                (what, result.adapter),
                ("steps", f"{result.steps:,}, the {what} of step {result.best_step:,}"),
                ("rows", rows),
                ("tokens", f"{result.tokens:,} processed, {result.trained_tokens:,} trained"),
                ("training loss", f"{result.train_loss:.4f}"),
                ("trained parameters", share(result.trainable_parameters, result.total_parameters)),
                ("rate", f"{result.tokens_per_second:,.0f} tokens/s"),
                ("peak memory", size(result.peak_memory_bytes)),
                ("time", clock(result.seconds)),
            ]
        ),
        "",
        f"Try it:  lorafleet generate --{what} {result.adapter} --prompt ...",
        f"Test it: lorafleet eval --{what} {result.adapter} --data ...",
    )


def fleet(result: "FleetResult") -> None:
    """A row for each adapter, and what they say together."""
    from lorafleet.fleets.report import conclusion
    from lorafleet.fleets.report import table as table_of

    head, rows = table_of(result)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    put(table, "", *conclusion(result), "", f"The report: {result.output_dir}/report.html")


def compare(result: "CompareResult") -> None:
    """The five tables of the report, and what they say."""
    from lorafleet.comparison.conclusion import conclusion
    from lorafleet.comparison.report import tables

    parts: list[Table | str] = []
    for title, (head, rows) in tables(result).items():
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        parts += [table, ""]
    put(*parts, *conclusion(result), "", f"The report: {result.output_dir}/report.html")


def evaluate(result: "EvalResult") -> None:
    """The base beside the adapter, and whether the difference is more than chance."""
    majority = result.majority
    put(
        comparison(result.metrics),
        facts(
            [
                ("rows", f"{result.rows:,} of {result.split}, {result.data}"),
                *([("always " + majority["label"], f"{majority['accuracy']:.1%}")] if majority else []),
                *_differences(result),
                ("predictions", result.predictions),
                ("time", clock(result.seconds)),
            ]
        ),
        *(Text(f"note: {warning}", style="yellow") for warning in result.warnings),
    )


def _differences(result: "EvalResult") -> list[tuple[str, str]]:
    """The adapter's accuracy less that of the base and of the majority label, with McNemar's p."""
    others = {
        "base": result.metrics.get("base", {}).get("accuracy"),
        "majority": (result.majority or {}).get("accuracy"),
    }
    rows = []
    for name, other in others.items():
        p_value = result.p_values.get(f"adapter_vs_{name}")
        if other is not None and p_value is not None:
            points = 100 * (result.metrics["adapter"]["accuracy"] - other)
            rows.append((f"adapter against {name}", f"{points:+.1f} points, McNemar p = {p_value:.2g}"))
    return rows


def estimate(result: "Estimate") -> None:
    """Time, memory by part, where it fits, and what has to be kept."""
    rates, methods = result.rates, result.methods
    parts = [name for name in vars(methods[0].memory) if any(vars(one.memory)[name] for one in methods)]
    precisions = list(methods[0].answering)
    time = _numbers("method", "trained parameters", "of the base", "steps", "GFLOP a token", "tokens/s", "time")
    memory = _numbers("memory in training", *parts, "together")
    places = _numbers("on a GPU, base in", *precisions, *methods[0].fits)
    kept = _numbers("answering 8 rows", *precisions, "a task's file", f"{result.tasks:,} tasks on disk")
    for one in methods:
        time.add_row(
            one.name,
            f"{one.trainable_parameters:,}",
            f"{one.trainable_share:.3%}",
            f"{one.steps:,}",
            f"{one.flops_per_token / 1e9:,.2f}",
            f"{one.tokens_per_second:,.0f}",
            clock(one.seconds),
        )
        memory.add_row(one.name, *(size(vars(one.memory)[part]) for part in parts), size(one.memory.total))
        places.add_row(one.name, *map(size, one.by_precision.values()), *(_fitting(one, p) for p in one.fits.values()))
        kept.add_row(one.name, *map(size, one.answering.values()), size(one.storage_bytes), size(one.tasks_bytes))
    speed = f"{rates.flops / 1e9:,.0f} GFLOP/s in products of this shape, {rates.traffic / 1e9:,.0f} GB/s beside them"
    put(
        facts(
            [
                ("base", f"{result.model}, {result.total_parameters:,} parameters, {size(result.base_bytes)}"),
                ("rows", result.data),
                (rates.device, f"{result.dtype}, {size(result.available_bytes)} free, {speed}"),
            ]
        ),
        *(time, memory, places, kept),
        "Time is that of the steps alone, without evaluations.",
    )


def advise(result: "Advice") -> None:
    """The file for ``train``, as it is."""
    click.echo(result.yaml, nl=False)


def _fitting(one: "MethodEstimate", precisions: Sequence[str]) -> str:
    possible = [name for name, needed in one.by_precision.items() if needed is not None]
    return "any" if list(precisions) == possible else ", ".join(precisions) or "no"


def _numbers(*columns: str) -> Table:
    """A table of numbers: all columns but the first to the right."""
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def generate(result: "GenerateResult") -> None:
    """Answers under their prompts, untouched by wrapping; a single answer was printed as it came."""
    alone = len(result.answers) == 1
    for answer in result.answers:
        if not alone:
            click.echo(click.style(f"> {answer.prompt}", bold=True))
        click.echo("" if alone else answer.text)
        if answer.base_text is not None:
            click.echo(("\n" if alone else "") + f"[base] {answer.base_text}")
        if not alone:
            click.echo()


def chat(result: "ChatResult") -> None:
    """Nothing: it was printed as it came."""


def merge(result: "MergeResult") -> None:
    """Where the model is, and how it was checked."""
    put(
        facts(
            [
                ("model", result.output_dir),
                ("precision", result.dtype),
                ("size", size(result.bytes)),
                ("tensors", f"{result.changed_tensors} changed, {result.unchanged_tensors} as in the base"),
                ("embeddings", "input and output are two matrices now" if result.untied else None),
                ("adapter's effect", f"{result.adapter_effect:.2e} of the largest logit"),
                ("merged against adapter", f"{result.logits_difference:.1e}, at most {result.tolerance:.0e} accepted"),
                ("time", clock(result.seconds)),
            ]
        )
    )


def quickstart(result: "QuickstartResult") -> None:
    """The four steps' results and what to try next."""
    trained, evaluated = result.train, result.evaluation
    evaluate(evaluated)
    put("")
    for review, answer in zip(REVIEWS, result.generation.answers, strict=True):
        put(
            Text(review, style="bold"),
            facts([("  base", (answer.base_text or "").strip()), ("  adapter", answer.text.strip())]),
        )
    put("")
    merge(result.merged)
    put(
        "",
        facts(
            [
                ("adapter", trained.adapter),
                ("sha256", f"{result.adapter_sha256} (the same after every such run on this machine)"),
                (
                    "trained",
                    f"{share(trained.trainable_parameters, trained.total_parameters)} in {clock(trained.seconds)}",
                ),
            ]
        ),
        "",
        "Next:",
        f"  lorafleet inspect {trained.adapter}",
        f"  lorafleet eval --adapter {trained.adapter} --data {KNOBS['data']} --split valid",
        f"  lorafleet generate --model {result.merged.output_dir} --prompt Hello",
        "  lorafleet train --model smollm2-135m --data your_rows.jsonl --output-dir runs/yours",
        "  lorafleet train --help",
    )


def inspect_data(report: "DataReport") -> None:
    """Counts, faults and one decoded example."""
    put(report.render())


def inspect(found: "Inspection") -> None:
    """Totals, then one line for each kind of layer, then where the adapter can be served."""
    ratio = found.reduction_ratio
    scales = [f"{s['scale']:g} (r {s['r']}, alpha {s['lora_alpha']:g}, {s['modules']} modules)" for s in found.scales]
    put(
        facts(
            [
                (found.kind, found.target),
                ("base", found.base if found.kind == "adapter" else None),
                ("architecture", found.architecture),
                ("total parameters", f"{found.total_parameters:,}" if found.total_parameters else None),
                ("adapter parameters", share(found.adapter_parameters, found.total_parameters)),
                ("trainable parameters", share(found.trainable_parameters, found.total_parameters)),
                ("reduction", f"{ratio:,.0f}× fewer to train and to store" if ratio else None),
                ("base on disk", size(found.base_bytes)),
                ("adapter on disk", size(found.adapter_bytes)),
                ("effective scale", ", ".join(scales)),
            ]
        ),
        _groups(found),
        facts((f"runs in {runtime}", _verdict(why)) for runtime, why in found.deployability.items()),
    )


def _groups(found: "Inspection") -> Table:
    table = Table("layers", "count", "in → out", "r", "scale", "adapter parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for group in found.groups:
        adapted = (str(group.r), f"{group.scale:g}", f"{group.adapter_parameters:,}") if group.r else ("", "", "")
        table.add_row(group.name, str(group.count), f"{group.in_features:,} → {group.out_features:,}", *adapted)
    return table


def _verdict(reasons: list[str]) -> str:
    return "yes" if not reasons else "no: " + "; ".join(reasons)


def doctor(report: Mapping[str, Any]) -> None:
    """Every fact of the report; what needs attention last."""
    put(facts(_doctor_rows(report)))
    problems = report["problems"]
    put("", *[f"attention: {problem}" for problem in problems] or ["No problems found."])


def _doctor_rows(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            rows += [(name, facts((key, _fact(key, item)) for key, item in value.items()))]
        elif name != "problems":
            rows.append((name.replace("_", " "), value))
    return rows


def _fact(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return size(value) if key.endswith("_bytes") else "not installed" if value is None else value


def tune(result: "TuneResult") -> None:
    """The ranking, what the search cost, and the winner."""
    table = Table("trial", "settings", *result.objectives, "state", title="all trials, the best first")
    for trial in result.trials:
        values = [in_figures(*pair) for pair in zip(result.objectives, trial["values"] or (), strict=False)]
        last = list(trial["at_rungs"].values())[-1:]
        if not values and last:
            values = [f"({in_figures(result.objectives[0], last[0])})"]
        cells = [*values, *[""] * (len(result.objectives) - len(values))]
        same = f", as trial {trial['same_as']}" if trial["same_as"] is not None else ""
        state = {"pruned": "stopped early", "fail": "failed"}.get(trial["state"], trial["state"])
        choice = ", to choose from" if trial["number"] in result.front else ""
        table.add_row(str(trial["number"]), in_words(trial["settings"]), *cells, state + same + choice)
    put(
        table,
        facts(
            [
                ("best", f"trial {result.best_trial}: {in_words(result.best_settings)}"),
                ("adapter", result.best),
                *(
                    (f"share of {name}", f"{part:.0%} of what sets the best apart")
                    for name, part in result.importances.items()
                ),
                ("trained together", f"up to {result.population_size}"),
                (
                    "tokens",
                    f"{result.tokens:,}, {result.tokens / result.full_tokens:.0%} of what all trials would take",
                ),
                ("time", clock(result.seconds)),
            ]
        ),
        "",
        f"Use it:         lorafleet generate --adapter {result.best} --prompt ...",
        f"Train it again: lorafleet train {result.best}/lorafleet.yaml",
    )
