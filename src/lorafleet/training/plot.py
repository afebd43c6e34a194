"""The loss curve of a run as a picture, and what pictures in a page have in common."""

import json
from io import StringIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 6.0
"""Inches of a picture in a page: narrow, so that its words can be read on a telephone."""


def plot_losses(metrics: Path, target: Path, title: str, eval_loss_before: float | None = None) -> None:
    """Draw ``metrics.jsonl`` as a PNG: the loss of each step, its running mean, and the held-out losses.

    Args:
        metrics: The log of a run.
        target: The PNG to write.
        title: Shown above.
        eval_loss_before: Held-out loss at step 0.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [(r["step"], float(r["loss"])) for r in records if r["event"] == "step"]
    evals = [(r["step"], float(r["eval_loss"])) for r in records if r["event"] == "eval"]
    if eval_loss_before is not None:
        evals.insert(0, (0, eval_loss_before))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        x, losses = zip(*steps, strict=True)
        axes.plot(x, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(x, running_mean(losses), color="tab:blue", label="training, running mean")
    if evals:
        x, held_out = zip(*evals, strict=True)
        axes.plot(x, held_out, color="tab:orange", marker="o", label="held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)


def running_mean(values: tuple[float, ...], decay: float = 0.9) -> list[float]:
    """Exponentially weighted mean of the values so far, without the bias towards the first."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty picture for a page, of this height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element that grows and shrinks with its page."""
    out = StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
