"""What a fleet came to, as a page and as Markdown: everybody's scores, who gained, who got worse, who passed."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lorafleet.evaluation.metrics import in_figures, in_words
from lorafleet.files.atomic import write_text
from lorafleet.files.page import document, html_table, markdown_table
from lorafleet.fleets.result import FleetResult, Interval, MemberResult
from lorafleet.training.plot import as_svg, new_figure
from lorafleet.training.report import clock

_WHO = ("base", "majority", "prod", "shared", "shared keyed", "own")


def write_report(result: FleetResult) -> Path:
    """Write ``report.html`` and ``report.md``; returns the page."""
    folder = Path(result.output_dir)
    write_text(folder / "report.md", markdown(result))
    write_text(folder / "report.html", page(result))
    return folder / "report.html"


def conclusion(result: FleetResult) -> list[str]:
    """What the numbers say, in sentences."""
    by = {status: [one for one in result.members if one.status == status] for status in _STATUSES}
    counts = ", ".join(f"{len(found)} {status}" for status, found in by.items() if found)
    sentences = [f"{len(result.members)} adapters: {counts}."]
    for who, (gain, interval) in result.pooled_gains.items():
        low, high = interval or (0.0, 0.0)  # a single row tells nothing of chance
        metric = result.pooled_metric
        whom = {"majority": "each user's most frequent label", "base": "the base"}.get(who, f"the {who} adapter")
        what = "better than" if low > 0 else "worse than" if high < 0 else "within noise of"
        figures = _with_interval(metric, gain, interval) + ("" if interval else " on a single row")
        sentences.append(
            f"Over all users' held-out rows, own adapters are {what} {whom}: {in_words(metric)} {figures}."
        )
    gains = [one for one in result.members if one.gain is not None and one.kind != "shared"]
    if gains:
        worse = [one.name for one in gains if one.interval and one.interval[1] < 0]
        up = sum((one.gain or 0.0) > 0 for one in gains)
        sentences.append(
            f"{up} of {len(gains)} gained; "
            + (f"worse by more than chance: {', '.join(worse)}." if worse else "none is worse by more than chance.")
        )
    sentences.append(
        f"Training took {clock(result.train_seconds)} with up to {result.population_size} adapters together, "
        f"all of it {clock(result.seconds)}."
    )
    return sentences


def table(result: FleetResult) -> tuple[list[str], list[list[str]]]:
    """One row for each member."""
    whom = [who for who in _WHO if any(who in (one.scores or {}) for one in result.members)]
    head = ["adapter", *whom, "gain", "rows", "tokens", "verdict"]
    return head, [_row(one, whom) for one in result.members]


def ways(result: FleetResult) -> tuple[list[str], list[list[str]]]:
    """One row for each way to serve all tasks."""
    metrics = {one.name: one.metric for one in result.members}
    tasks = list(next(way.scores for way in result.ways))
    head = ["way", *(f"{task}: {in_words(metrics[task])}" for task in tasks), "parameters", "MB"]
    rows = []
    for way in result.ways:
        cells = [in_figures(metrics[task], way.scores[task]) if way.scores else "" for task in tasks]
        kept = [f"{way.parameters:,}", f"{way.bytes / 1e6:.1f}"] if way.scores else [way.error or "", ""]
        rows.append([way.name, *cells, *kept])
    return head, rows


def markdown(result: FleetResult) -> str:
    """The report as Markdown."""
    parts = [f"# Fleet: {Path(result.output_dir).resolve().name}", *conclusion(result), markdown_table(*table(result))]
    if result.pooled:
        parts.insert(2, markdown_table(*_pooled(result)))
    if result.ways:
        parts += ["## Ways to serve all tasks", markdown_table(*ways(result))]
    return "\n\n".join(parts) + "\n"


def page(result: FleetResult) -> str:
    """The report as a page that loads nothing."""
    head, rows = table(result)
    body = [f"<h1>Fleet: {escape(Path(result.output_dir).resolve().name)}</h1>"]
    body += [f"<p>{escape(sentence)}</p>" for sentence in conclusion(result)]
    if result.pooled:
        body.append(f"<section><h2>All users</h2>{html_table(*_pooled(result), best=None, wide=0)}</section>")
    if picture := gains(result.members):
        note = "How much better each adapter is than the shared one, or than the base; bars: where chance could put it."
        body.append(f"<section><h2>Gains</h2><p class=note>{note}</p><figure>{picture}</figure></section>")
    if result.ways:
        table_of_ways = html_table(*ways(result), best=None, wide=0)
        body.append(f"<section><h2>Ways to serve all tasks</h2>{table_of_ways}</section>")
    body.append(f"<section><h2>Adapters</h2>{html_table(head, rows, best=None, wide=0)}</section>")
    return document(f"Fleet: {Path(result.output_dir).resolve().name}", "\n".join(body))


def gains(members: Sequence[MemberResult]) -> str | None:
    """Every member's gain with its interval, the smallest first."""
    found = sorted((one for one in members if one.gain is not None and one.kind != "shared"), key=_gain)
    if not found:
        return None
    figure, axes = new_figure(max(2.0, 0.6 + 0.16 * len(found)))
    axes.axvline(0, color="#64748b", linewidth=1)
    for place, one in enumerate(found):
        low, high = one.interval or (_gain(one), _gain(one))
        axes.plot([_shown(one, low), _shown(one, high)], [place, place], color="#94a3b8", linewidth=2)
        color = "#64748b" if one.status == "passed" else "#c2410c"
        axes.plot(_shown(one, _gain(one)), place, marker="o", markersize=4, color=color)
    axes.set_yticks(range(len(found)), [one.name[:32] for one in found], fontsize=7)
    axes.set_ylim(-1, len(found))
    units = {"points" if one.metric != "loss" else "nats per token" for one in found}
    axes.set(xlabel=f"gain ({' or '.join(sorted(units))}; orange: did not pass)")
    axes.grid(alpha=0.3, axis="x")
    return as_svg(figure)


_STATUSES = ("passed", "rejected", "failed", "left out")


def _row(one: MemberResult, whom: Sequence[str]) -> list[str]:
    scores = one.scores or {}
    cells = [
        in_figures(one.metric, scores[who][one.metric]) if one.metric in scores.get(who, ()) else "" for who in whom
    ]
    gain = "" if one.gain is None else _with_interval(one.metric, one.gain, one.interval)
    verdict = f"{one.status}{f', {one.version}' if one.version else ''}"
    told = f": {'; '.join([*one.reasons, *one.notes])}" if one.reasons or one.notes else ""
    rows = f"{one.trained_rows:,} + {one.measured_rows:,}" if one.trained_rows else ""
    return [one.name, *cells, gain, rows, f"{one.tokens:,}" if one.tokens else "", verdict + told]


def _pooled(result: FleetResult) -> tuple[list[str], list[list[str]]]:
    whom = [who for who in _WHO if who in result.pooled]
    metric = result.pooled_metric
    return [in_words(metric), *whom], [["all rows", *(in_figures(metric, result.pooled[who]) for who in whom)]]


def _gain(one: MemberResult) -> float:
    return one.gain or 0.0


def _shown(one: MemberResult, value: float) -> float:
    return value if one.metric == "loss" else 100 * value


def _with_interval(metric: str, gain: float, interval: Interval | None) -> str:
    """A gain with its unit, and where chance could put it."""
    figures = [f"{value:+.3f}" if metric == "loss" else f"{100 * value:+.1f}" for value in (gain, *(interval or ()))]
    unit = "" if metric == "loss" else " points"
    return f"{figures[0]}{unit}" + (f" ({figures[1]} to {figures[2]})" if interval else "")
