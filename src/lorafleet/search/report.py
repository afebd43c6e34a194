"""The report of a search: ``report.html``, which needs nothing beside itself, and ``report.md``."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lorafleet.evaluation.metrics import in_figures
from lorafleet.files.atomic import write_text
from lorafleet.files.page import document, html_table, markdown_table
from lorafleet.files.run_folder import METRICS
from lorafleet.search import plots
from lorafleet.search.objectives import DIRECTIONS
from lorafleet.search.result import TuneResult
from lorafleet.search.space import in_words
from lorafleet.training.report import clock

STATES = {"complete": "complete", "pruned": "stopped early", "fail": "failed", "running": "running"}

Trial = Mapping[str, Any]


def write_report(result: TuneResult) -> Path:
    """Write both reports into the run folder; return the page's path."""
    folder = Path(result.output_dir)
    write_text(folder / "report.md", markdown(result))
    write_text(folder / "report.html", page(result, folder / METRICS))
    return folder / "report.html"


def conclusion(result: TuneResult) -> list[str]:
    """What was found, in sentences that follow from the numbers."""
    best, objective = result.trials[0], result.objectives[0]
    done = [trial for trial in result.trials if trial["values"]]
    by = f" by {objective}" if result.front else ""
    found = [
        f"The best of {len(result.trials)} settings{by} is trial {result.best_trial}: {in_words(result.best_settings)}."
    ]
    if result.front:
        found.append(
            f"{' and '.join(result.objectives)} are weighed against each other by you: the choice is among the trials "
            f"{', '.join(str(trial['number']) for trial in result.trials if trial['number'] in result.front)}. For "
            "every other one, one of these is at least as good in all of them and better in one."
        )
    if objective in result.before:
        before, after = (in_figures(objective, value) for value in (result.before[objective], best["values"][0]))
        found.append(f"Its held-out {objective} is {after}; the base's was {before}.")
    if len(done) > 1:
        spread = _spread(best, objective)
        gap = abs(done[1]["values"][0] - best["values"][0])
        within = spread is not None and gap < spread
        second = f"The second best, trial {done[1]['number']}, is {in_figures(objective, gap)} behind"
        found.append(second + (", less than the best one's own seeds differ." if within else "."))
    stopped = sum(trial["state"] == "pruned" for trial in result.trials)
    share = result.tokens / result.full_tokens
    found.append(
        f"{stopped} trials were stopped early, so the search took {result.tokens:,} tokens: {share:.0%} of the "
        f"{result.full_tokens:,} that all trials would have taken. It took {clock(result.seconds)}; at the same rate "
        f"all trials to their end would have taken about {clock(result.seconds / share)}."
    )
    ends = _at_an_end(result)
    if ends:
        found.append(
            f"The best value of {' and '.join(ends)} is at the end of what was searched; better ones may lie beyond."
        )
    return found


def _spread(trial: Trial, objective: str) -> float | None:
    values = [run[objective] for run in trial["runs"].values()]
    return max(values) - min(values) if len(values) > 1 else None


def _at_an_end(result: TuneResult) -> list[str]:
    """Knobs with three values or more of which the winner has the least or the largest."""
    found = []
    for name, value in result.best_settings.items():
        tried = {
            trial["settings"].get(name)
            for trial in result.trials
            if not isinstance(trial["settings"].get(name), list | dict)
        }
        numbers = sorted(one for one in tried if isinstance(one, int | float) and not isinstance(one, bool))
        if len(numbers) > 2 and value in (numbers[0], numbers[-1]):
            found.append(name)
    return found


def _columns(result: TuneResult) -> list[str]:
    return ["rank", "trial", "settings", *result.objectives, "state", "tokens", "time"]


def _rows(result: TuneResult) -> list[list[str]]:
    rows = []
    for rank, trial in enumerate(result.trials, 1):
        last = plots.last_value(trial)
        values = [
            in_figures(name, value) for name, value in zip(result.objectives, trial["values"] or (), strict=False)
        ]
        spread = _spread(trial, result.objectives[0])
        if values and spread is not None:
            values[0] += f" (seeds differ by {in_figures(result.objectives[0], spread)})"
        if not values:
            values = [f"{in_figures(result.objectives[0], last)} when stopped" if last is not None else ""]
            values += [""] * (len(result.objectives) - 1)
        same = "" if trial["same_as"] is None else f", as trial {trial['same_as']}"
        cost = [f"{trial['tokens']:,}", clock(trial["seconds"])] if trial["tokens"] else ["", ""]
        state = STATES.get(trial["state"], trial["state"]) + same
        state += ", to choose from" if trial["number"] in result.front else ""
        rows.append([str(rank), str(trial["number"]), in_words(trial["settings"]), *values, state, *cost])
    return rows


def markdown(result: TuneResult) -> str:
    """The report without pictures."""
    shares = [f"- {name}: {share:.0%}" for name, share in result.importances.items()]
    parts = [
        f"# Search: {Path(result.output_dir).resolve().name}",
        "\n".join(conclusion(result)),
        "## Trials\n\n" + markdown_table(_columns(result), _rows(result)),
        "## What made the difference\n\n" + "\n".join(shares) if shares else "",
        f"## Use it\n\n{_commands(result)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(result: TuneResult) -> str:
    return (
        f"    lorafleet generate --adapter {result.best} --prompt ...\n"
        f"    lorafleet train {result.best}/lorafleet.yaml    # the winner again, with the full budget"
    )


def page(result: TuneResult, metrics: Path) -> str:
    """The report as a page that loads nothing."""
    objective, trials = result.objectives[0], result.trials
    name = escape(Path(result.output_dir).resolve().name)
    settings = "".join(
        f"<div><dt>{escape(knob)}</dt><dd>{escape(in_words({'': value}).strip())}</dd></div>"
        for knob, value in result.best_settings.items()
    )
    yaml = (Path(result.best) / "lorafleet.yaml").read_text(encoding="utf-8")
    pictures = [
        ("Training", "One line for each trial; × where it was stopped.", plots.curves(metrics, trials, objective)),
        ("Comparisons", "Where trials were compared, and at the end.", plots.rungs(trials, objective)),
    ]
    if result.front:
        pictures.insert(0, ("What to choose from", "", plots.front(trials, result.objectives, result.front)))
    if result.importances:
        how = "Optuna's PED-ANOVA: which knobs set the best trials apart from all others, stopped ones included."
        pictures.append(("What made the difference", how, plots.importances(result.importances)))
    pictures.append(
        ("Settings", "Dashed where a trial was stopped: its last value.", plots.parallel(trials, objective))
    )
    heat = plots.heat_map(trials, objective)
    if heat:
        pictures.append(("Rank and alpha", "The last value of each trial, stopped or not.", heat))
    direction = "smaller" if DIRECTIONS[objective] == "minimize" else "larger"
    body = _BODY.format(
        name=name,
        sentences="".join(f"<p>{escape(sentence)}</p>" for sentence in conclusion(result)),
        objective=escape(objective),
        value=in_figures(objective, trials[0]["values"][0]),
        direction=direction,
        trial=result.best_trial,
        settings=settings,
        table=html_table(_columns(result), _rows(result), best=0, wide=2),
        pictures="".join(
            f"<section><h2>{title}</h2><p class=note>{note}</p><figure>{svg}</figure></section>"
            for title, note, svg in pictures
        ),
        commands=escape(_commands(result)),
        yaml=escape(yaml),
    )
    return document(f"Search: {Path(result.output_dir).resolve().name}", body, _STYLE)


_STYLE = """
.winner { border: 2px solid var(--best); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.winner strong { font-size: 1.6rem; color: var(--best); }
dl { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; margin: 0.5rem 0 0; }
dt { color: var(--soft); font-size: 0.85rem; } dd { margin: 0; font-weight: 600; }
"""

_BODY = """<h1>Search: {name}</h1>
<div class="winner"><div>Trial {trial} is the best, with a held-out {objective} of</div>
<strong>{value}</strong> <span class="note">({direction} is better)</span><dl>{settings}</dl></div>
{sentences}
<section><h2>Trials</h2>{table}
<p class="note">Time: of the steps that a trial took part in, which it shared with others.</p></section>
{pictures}
<section><h2>Use it</h2><pre>{commands}</pre></section>
<section><h2>The winner's settings</h2><pre>{yaml}</pre></section>
"""
