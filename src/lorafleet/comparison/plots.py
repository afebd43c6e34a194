"""The pictures of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorafleet.comparison.conclusion import gap_of
from lorafleet.comparison.result import CompareResult
from lorafleet.evaluation.metrics import in_words
from lorafleet.training.plot import as_svg, new_figure, running_mean

Row = Mapping[str, Any]

PERCENT = ("accuracy", "macro_f1", "exact_match")


def color(number: int) -> Any:
    """The color of a method, the same in all pictures."""
    return colormaps["tab10"](number % 10)


def spread(axes: Axes, which: str) -> None:
    """Plain numbers at the axis ``x`` or ``y``, logarithmic where what is drawn spans more than a decade."""
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes.dataLim, f"interval{which}")
    if high > 10 * low > 0:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: in_short(value)))


def in_short(value: float) -> str:
    """A number at an axis: 0.3, 20, 500k, 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def pareto(result: CompareResult, x_of: Callable[[Row], float], label: str) -> str:
    """Quality with its interval over a cost; the base's quality as a line."""
    merit = result.merit
    figure, axes = new_figure(3.6)
    axes.axhline(_shown(merit, result.base["quality"][merit]), color="#64748b", linestyle="--", linewidth=1)
    axes.annotate("base", (1, _shown(merit, result.base["quality"][merit])), xycoords=("axes fraction", "data"))
    for number, row in enumerate(result.methods):
        y = _shown(merit, row["quality"][merit])
        interval = row["intervals"].get(merit)
        errors = None
        if interval:
            errors = [[max(0.0, y - _shown(merit, interval[0]))], [max(0.0, _shown(merit, interval[1]) - y)]]
        axes.errorbar(x_of(row), y, yerr=errors, fmt="o", color=color(number), capsize=3, label=row["name"])
    if result.methods:
        spread(axes, "x")
        _names(figure)
    axes.margins(x=0.1)
    axes.set(xlabel=label, ylabel=f"{in_words(merit)} ({_unit(merit)})")
    axes.grid(alpha=0.3)
    return as_svg(figure)


def curves(methods: Sequence[Row]) -> str:
    """Training loss and, as points, held-out loss of each method over its steps."""
    figure, axes = new_figure(3.8)
    for number, row in enumerate(methods):
        steps = [(one["step"], float(one["loss"])) for one in row["curve"] if "loss" in one]
        evaluated = [(one["step"], float(one["eval_loss"])) for one in row["curve"] if "eval_loss" in one]
        x, y = zip(*steps, strict=True)
        axes.plot(x, running_mean(y), color=color(number), label=row["name"])
        if evaluated:
            x, y = zip(*evaluated, strict=True)
            axes.plot(x, y, color=color(number), marker="o", linestyle="none", markersize=4)
    spread(axes, "y")
    axes.set(xlabel="optimizer step (points: held-out rows)", ylabel="running mean loss (nats per token)")
    axes.grid(alpha=0.3)
    _names(figure)
    return as_svg(figure)


def gaps(methods: Sequence[Row]) -> str:
    """How far held-out rows are behind those that were seen, over the number of these."""
    figure, axes = new_figure(3.4)
    for number, row in enumerate(methods):
        known = [(one["rows"], apart) for one in row["gaps"] if (apart := gap_of(one)) is not None]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, color=color(number), marker="o", label=row["name"])
    axes.axhline(0, color="#64748b", linestyle="--", linewidth=1)
    spread(axes, "x")
    axes.set(xlabel="rows trained on", ylabel="held-out loss above the seen rows' (nats)")
    axes.grid(alpha=0.3)
    _names(figure)
    return as_svg(figure)


def bars(methods: Sequence[Row], value_of: Callable[[Row], float], label: str, *, log: bool = False) -> str:
    """One number of each method, written at its bar."""
    figure, axes = new_figure(0.7 + 0.36 * len(methods))
    values = [value_of(row) for row in methods]
    drawn = axes.barh([row["name"] for row in methods], values, color=[color(i) for i in range(len(methods))])
    axes.bar_label(drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=4)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_short(value)))
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel=label)
    return as_svg(figure)


def _names(figure: Figure) -> None:
    """Which color is which method, above the picture: in it there may be no room."""
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)


def _shown(metric: str, value: float) -> float:
    return 100 * value if metric in PERCENT else value


def _unit(metric: str) -> str:
    if metric in PERCENT:
        return "% of rows"
    return {"loss": "nats per token, lower is better"}.get(metric, "0 to 100")
