"""The report of a comparison: ``report.html``, which needs nothing beside itself, and ``report.md``."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lorafleet.comparison import plots
from lorafleet.comparison.conclusion import conclusion, gap_of
from lorafleet.comparison.result import FALLING, CompareResult
from lorafleet.evaluation.metrics import in_figures, in_words
from lorafleet.files.atomic import write_text
from lorafleet.files.page import document, html_table, markdown_table
from lorafleet.training.plot import running_mean
from lorafleet.training.report import clock

Row = Mapping[str, Any]


def write_report(result: CompareResult) -> Path:
    """Write both reports into the comparison's folder; return the page's path."""
    folder = Path(result.output_dir)
    write_text(folder / "report.md", markdown(result))
    write_text(folder / "report.html", page(result))
    return folder / "report.html"


def tables(result: CompareResult) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The five questions, each a table with a row for each method and the base where it has an answer."""
    rows, base = result.methods, result.base
    metrics = [name for name in base["quality"] if name != "perplexity"]
    quality = [["base", *(_with_interval(base, name) for name in metrics), ""]]
    quality += [
        [row["name"], *(_with_interval(row, name) for name in metrics), _place(row, result.merit)] for row in rows
    ]
    failed = [[name, f"failed: {why.splitlines()[0]}", "", "", ""] for name, why in result.failed.items()]
    return {
        "Parameters and memory": (
            ["method", "trained parameters", "of the model", "optimizer", "peak memory in training"],
            [
                [
                    row["name"],
                    f"{row['trainable_parameters']:,}",
                    f"{row['trainable_share']:.3%}",
                    megabytes(row["optimizer_bytes"]),
                    megabytes(row["training_peak_bytes"]),
                ]
                for row in rows
            ]
            + failed,
        ),
        "Training speed": (
            ["method", "learning rate", "steps", "tokens/s", "in padded batches", "time", "loss at the end"],
            [
                [
                    row["name"],
                    _rate(row),
                    f"{row['steps']:,}",
                    f"{row['training_tokens_per_second']:,.0f}",
                    f"{row['padded_tokens_per_second']:,.0f}",
                    clock(row["training_seconds"]),
                    f"{_last_loss(row):.4f}",
                ]
                for row in rows
            ],
        ),
        "Inference speed": (
            [
                "method",
                "first token",
                "one row, tokens/s",
                "8 rows, tokens/s",
                "merged: first token",
                "one row",
                "8 rows",
            ],
            [_speeds("base", base), *(_speeds(row["name"], row) for row in rows)],
        ),
        "Storage": (
            ["method", "to keep for each task", "to load it"],
            [[row["name"], megabytes(row["storage_bytes"]), f"{row['load_seconds']:.2f} s"] for row in rows],
        ),
        "Quality": (["method", *(in_words(name) for name in metrics), "beside the best"], quality),
        "Forgetting": (
            ["method", "loss on other text", "change by training"],
            [
                ["base", f"{base['general_loss']:.4f}", ""],
                *([row["name"], f"{row['general_loss']:.4f}", f"{row['forgetting']:+.4f}"] for row in rows),
            ],
        ),
        "Overfitting": (
            ["method", *(f"{one['rows']:,} rows" for one in (rows[0]["gaps"] if rows else []))],
            [[row["name"], *map(_losses, row["gaps"])] for row in rows],
        ),
    }


def megabytes(count: float) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:,.1f} MB"


def _with_interval(row: Row, metric: str) -> str:
    value, interval = row["quality"].get(metric), row["intervals"].get(metric)
    if value is None:
        return ""
    between = f" ({in_figures(metric, interval[0])} to {in_figures(metric, interval[1])})" if interval else ""
    return in_figures(metric, value) + between


def _place(row: Row, merit: str) -> str:
    if row["best"]:
        return f"best {in_words(merit)}"
    if row["within_noise"]:
        return "within noise"
    if merit == "chrf":
        return f"behind (p = {row['p_values'][merit]:.2g})"
    if row["behind_best"] is None:
        return ""
    low, high = (abs(one) for one in row["behind_best"])
    return f"behind by {in_figures(merit, min(low, high))} to {in_figures(merit, max(low, high))}"


def _losses(gap: Row) -> str:
    apart = gap_of(gap)
    return "no number" if apart is None else f"{apart:+.3f} ({gap['train_loss']:.3f} to {gap['eval_loss']:.3f})"


def _rate(row: Row) -> str:
    if row["rates"] is None:
        return "as given"
    return f"{row['rates']['rate']:.1e}"


def _last_loss(row: Row) -> float:
    losses = tuple(float(one["loss"]) for one in row["curve"] if "loss" in one)
    return running_mean(losses)[-1]


def _speeds(name: str, row: Row) -> list[str]:
    cells = [name, *_speed(row["speed"])]
    return cells + (_speed(row["merged_speed"]) if row.get("merged_speed") else ["", "", ""])


def _speed(speed: Row) -> list[str]:
    return [f"{speed['first_token'] * 1000:.0f} ms", f"{speed['single']:.1f}", f"{speed['batch']:.1f}"]


def notes(result: CompareResult) -> list[str]:
    """How the numbers came about, and what they cannot say."""
    direction = "lower is better" if result.merit in FALLING else "higher is better"
    found = [
        f"Quality: {result.rows} {result.split} rows of {result.data}; in brackets the 95 % interval, by resampling "
        f"rows. Methods are ranked by {in_words(result.merit)} ({direction}).",
        f"Forgetting: the loss on {result.forgetting_text}, text that has nothing to do with the task.",
        "Overfitting: how far the loss on held-out rows is above that on rows that were seen (in brackets the two), "
        "after as many steps on few rows; in the last column after the training on all.",
        "Peak memory: of the whole training process, the base and the libraries included.",
    ]
    searched = [row for row in result.methods if row["rates"]]
    if searched:
        steps = searched[0]["rates"]["steps"]
        tried = ", ".join(f"{row['name']} {len(row['rates']['runs'])}" for row in searched)
        found.append(f"Learning rates: the best of short runs of {steps} steps each; runs: {tried}.")
        for row in searched:
            if given_up := row["rates"].get("given_up"):
                rates = ", ".join(f"{rate:.1e}" for rate in given_up)
                found.append(f"{row['name']}: {rates} did best in the short runs, and diverged in the whole training.")
        ends = [row["name"] for row in searched if row["rates"]["at_end"]]
        if ends:
            found.append(f"{', '.join(ends)}: the best rate was the last that was tried; a better one may lie beyond.")
    if len({row["tokens"] for row in result.methods}) > 1:
        found.append("The methods were not trained on equally many tokens: by early stopping, or options of their own.")
    if result.split == "valid":
        found.append(
            "There are no test rows: quality is measured on rows that learning rates and checkpoints were chosen by, "
            "and is a little better than on new ones."
        )
    if result.base["dtype"] != "float32" and any(row["kind"] == "full" for row in result.methods):
        found.append(
            f"full changes weights in {result.base['dtype']}, where small changes are lost, the others train in "
            "float32: with --dtype float32 it may come out better."
        )
    padded = [row["name"] for row in result.methods if row["padded"]]
    if padded:
        found.append(
            f"{', '.join(padded)}: virtual tokens stand before each row, so that batches are padded. To compare "
            "methods by their own speed, look at the column of padded batches; without padding the others train faster."
        )
    return found


def markdown(result: CompareResult) -> str:
    """The report without pictures."""
    parts = [f"# Methods compared: {Path(result.output_dir).resolve().name}", "\n".join(conclusion(result))]
    parts += [f"## {title}\n\n{markdown_table(*table)}" for title, table in tables(result).items()]
    parts.append("\n".join(f"- {note}" for note in notes(result)))
    return "\n\n".join(parts) + "\n"


def page(result: CompareResult) -> str:
    """The report as a page that loads nothing."""
    name = f"Methods compared: {Path(result.output_dir).resolve().name}"
    best = next((i for i, row in enumerate(result.methods) if row["best"]), None)
    body = [f"<h1>{escape(name)}</h1>", *(f"<p>{escape(sentence)}</p>" for sentence in conclusion(result))]
    body.append(f'<p class="note">{escape(result.model)}, {escape(result.data)}</p>')
    for title, (head, rows) in tables(result).items():
        marked = best if best is None else best + (rows[0][0] == "base")
        body.append(f"<section><h2>{title}</h2>{html_table(head, rows, best=marked, wide=0)}</section>")
    if result.methods:
        body += [
            f"<section><h2>{title}</h2><figure>{svg}</figure></section>" for title, svg in _pictures(result).items()
        ]
    body.append("<section><h2>How it was measured</h2>" + "".join(f"<p>{escape(one)}</p>" for one in notes(result)))
    return document(name, "\n".join([*body, "</section>"]))


def _pictures(result: CompareResult) -> dict[str, str]:
    rows = result.methods
    return {
        "Quality and parameters": plots.pareto(result, lambda row: row["trainable_parameters"], "trained parameters"),
        "Quality and time": plots.pareto(result, lambda row: row["training_seconds"], "training time (s)"),
        "Learning": plots.curves(rows),
        "Overfitting": plots.gaps(rows),
        "Memory in training": plots.bars(rows, lambda row: row["training_peak_bytes"] / 1e6, "MB at the peak"),
        "Training speed, measured": plots.bars(rows, lambda row: row["training_tokens_per_second"], "tokens/s"),
        "Storage of a task": plots.bars(rows, lambda row: row["storage_bytes"] / 1e6, "MB", log=True),
    }
