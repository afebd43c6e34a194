"""The pictures of a search, as SVG that stands in a page by itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from lorafleet.search.objectives import DIRECTIONS
from lorafleet.training.plot import as_svg, new_figure, running_mean

WINNER, OTHERS, STOPPED = "#c2410c", "#334155", "#94a3b8"

UNITS = {
    "loss": "nats per trained token",
    "perplexity": "exp(loss)",
    "parameters": "trained numbers",
    "latency": "× the base's time",
}

Trial = Mapping[str, Any]


def curves(metrics: Path, trials: Sequence[Trial], objective: str) -> str:
    """Training loss of every trial over the tokens it has seen, with the points at which it was stopped."""
    seen: dict[int, tuple[list[int], list[float]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            tokens, losses = seen.setdefault(int(event["name"].split()[1]), ([], []))
            tokens.append(event["tokens"] + (tokens[-1] if tokens else 0))
            losses.append(float(event["loss"]))
    figure, axes = new_figure(3.6)
    for trial in reversed(trials):  # the winner last, on top
        if trial["number"] in seen:
            tokens, losses = seen[trial["number"]]
            _curve(axes, trial, tokens, running_mean(tuple(losses)), winner=trial is trials[0])
    axes.set(xlabel="tokens seen by the trial", ylabel="running mean (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)
    return as_svg(figure)


def _curve(axes: Axes, trial: Trial, tokens: Sequence[int], losses: Sequence[float], *, winner: bool) -> None:
    stopped = trial["state"] != "complete"
    color = WINNER if winner else STOPPED if stopped else OTHERS
    label = f"trial {trial['number']}, the best" if winner else None
    axes.plot(tokens, losses, color=color, linewidth=2.2 if winner else 1.1, label=label)
    if stopped:
        axes.plot(tokens[-1], losses[-1], marker="x", color=OTHERS, markersize=6)


def rungs(trials: Sequence[Trial], objective: str) -> str:
    """The objective of every trial where trials were compared, and at the end."""
    figure, axes = new_figure(3.6)
    ends = [trial["tokens"] for trial in trials if trial["values"]]
    for trial in reversed(trials):
        points = [(int(tokens), value) for tokens, value in trial["at_rungs"].items()]
        if trial["values"] and ends:
            points.append((max(ends), trial["values"][0]))
        if points:
            x, y = zip(*points, strict=True)
            winner = trial is trials[0]
            color = WINNER if winner else STOPPED if trial["state"] != "complete" else OTHERS
            axes.plot(x, y, marker="o", markersize=4, color=color, linewidth=2.2 if winner else 1.1)
    axes.set(xlabel="tokens seen by the trial", ylabel=f"held-out {_label(objective)}")
    axes.grid(alpha=0.3)
    return as_svg(figure)


def front(trials: Sequence[Trial], objectives: Sequence[str], chosen: Sequence[int]) -> str:
    """The first two objectives of every complete trial; those that no other one beats in all are joined."""
    figure, axes = new_figure(3.6)
    done = [trial for trial in trials if trial["values"]]
    best = sorted(trial["values"][:2] for trial in done if trial["number"] in chosen)
    axes.plot(*np.transpose([trial["values"][:2] for trial in done]), "o", color=STOPPED, markersize=5)
    axes.plot(*np.transpose(best), "o-", color=WINNER, markersize=5, linewidth=1.1, label="beaten by none")
    for trial in done:
        axes.annotate(f" {trial['number']}", trial["values"][:2], fontsize=8)
    axes.set(xlabel=_label(objectives[0]), ylabel=_label(objectives[1]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return as_svg(figure)


def importances(shares: Mapping[str, float]) -> str:
    """How much each knob has to do with being among the best."""
    ordered = sorted(shares.items(), key=lambda pair: pair[1])
    figure, axes = new_figure(0.9 + 0.4 * len(ordered))
    axes.barh([name for name, _ in ordered], [100 * share for _, share in ordered], color=WINNER)
    axes.set(xlabel="share in what sets the best trials apart (%)", xlim=(0, 100))
    return as_svg(figure)


def parallel(trials: Sequence[Trial], objective: str) -> str:
    """Every trial as a line through its values to its last objective; the best is marked, stopped ones are dashed."""
    seen = [(trial, value) for trial in trials if (value := last_value(trial)) is not None]
    names = list(dict.fromkeys(name for trial, _ in seen for name in trial["settings"]))
    figure, axes = new_figure(4.2)
    places = {name: _places([trial["settings"].get(name) for trial, _ in seen]) for name in names}
    low, high = min(value for _, value in seen), max(value for _, value in seen)
    for trial, value in reversed(seen):
        better = (value - low) / ((high - low) or 1)
        better = better if DIRECTIONS[objective] == "maximize" else 1 - better
        y = [places[name][_key(trial["settings"].get(name))] for name in names] + [better]
        winner, style = trial is trials[0], "-" if trial["values"] else "--"
        color = WINNER if winner else colormaps["viridis"](0.9 * better)
        axes.plot(range(len(names) + 1), y, style, color=color, alpha=0.8, linewidth=2.6 if winner else 1.2)
    for number, name in enumerate(names):
        for key, place in places[name].items():
            axes.annotate(key, (number, place), fontsize=8, ha="center", bbox={"fc": "white", "ec": "none", "pad": 1})
    best, worst = (high, low) if DIRECTIONS[objective] == "maximize" else (low, high)
    for place, value in ((1, best), (0, worst)):
        axes.annotate(f" {value:.4g}", (len(names), place), fontsize=8, va="center")
    axes.set_xticks(range(len(names) + 1), [*names, f"{objective}\n(top is better)"])
    axes.set_yticks([])
    axes.margins(x=0.08)
    return as_svg(figure)


def heat_map(trials: Sequence[Trial], objective: str) -> str | None:
    """The objective over r and lora_alpha, where both were searched; of several trials in a cell the best."""
    cells: dict[tuple[Any, Any], float] = {}
    sign = -1 if DIRECTIONS[objective] == "maximize" else 1
    for trial in trials:
        settings, last = trial["settings"], last_value(trial)
        if {"r", "lora_alpha"} <= set(settings) and last is not None:
            place = (settings["r"], settings["lora_alpha"])
            cells[place] = min(cells.get(place, sign * float("inf")), last, key=lambda value: sign * value)
    ranks, alphas = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    if len(ranks) < 2 or len(alphas) < 2:
        return None
    figure, axes = new_figure(4.2)
    grid = [[cells.get((r, alpha), float("nan")) for alpha in alphas] for r in ranks]
    image = axes.imshow(grid, cmap="viridis_r" if sign > 0 else "viridis", origin="lower", aspect="auto")
    for (r, alpha), value in cells.items():
        ink = "black" if sum(image.to_rgba(np.asarray(value))[:3]) > 1.5 else "white"
        axes.text(alphas.index(alpha), ranks.index(r), f"{value:.4g}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(ranks)), [str(r) for r in ranks])
    axes.set(xlabel="lora_alpha", ylabel="r")
    figure.colorbar(image, label=f"last held-out {_label(objective)}")
    return as_svg(figure)


def last_value(trial: Trial) -> float | None:
    """The first objective at the end, or at the last rung that a stopped trial has reached."""
    values = [*trial["at_rungs"].values(), *(trial["values"] or [])[:1]]
    return values[-1] if values else None


def _places(values: Sequence[Any]) -> dict[str, float]:
    """Heights from 0 to 1 for the values of one knob, in their order."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    keys = [_key(value) for value in (sorted(set(values)) if numbers else sorted(values, key=str))]
    keys = list(dict.fromkeys(keys))
    return {key: 0.5 if len(keys) == 1 else number / (len(keys) - 1) for number, key in enumerate(keys)}


def _key(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "as the run" if value is None else str(value)


def _label(objective: str) -> str:
    return f"{objective} ({UNITS.get(objective, 'share of rows')})"
