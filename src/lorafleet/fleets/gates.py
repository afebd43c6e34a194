"""Which adapters are let through: what each must reach, compared with whom, by more than chance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafleet.comparison.quality import difference
from lorafleet.config.fleet import GateConfig
from lorafleet.evaluation.metrics import in_figures, in_words

Rows = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Evidence:
    """What is known of an adapter when it stands at its gate.

    Args:
        scores: By whom (``own``, ``base``, ``shared``, ``prod``): metrics on its held-out rows.
        rows: By whom: for each of these rows its share in the metrics, as ``comparison.quality`` takes them.
        megabytes: Of its weights.
        forgetting: Rise of the loss on a general text; None where it was not asked for.
        reasons_against: Of each runtime, why it cannot serve the adapter.
        unmet: Rivals that are there and could not be measured, and why.
    """

    scores: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, Rows]
    megabytes: float
    forgetting: float | None = None
    reasons_against: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unmet: Mapping[str, str] = field(default_factory=dict)


def compared_by(gate: GateConfig, scores: Mapping[str, float]) -> str:
    """The metric by which an adapter is compared with others."""
    if gate.metric != "auto":
        return gate.metric
    return "accuracy" if "accuracy" in scores else "loss"


def not_compared(rival: str, why: str) -> str:
    """How a rival is told of that is there and could not be measured."""
    return f"not compared with {rival}: {why}"


def failures(gate: GateConfig, evidence: Evidence) -> list[str]:
    """Why an adapter does not pass; nothing where it does. Rivals that are not there are not met."""
    own = evidence.scores["own"]
    found = [f"{in_words(name)} is no number ({value})" for name, value in own.items() if not math.isfinite(value)]
    found += [
        f"{in_words(name)} {_figure(name, own)} is {word} {in_figures(name, limit)}"
        for limits, word, sign in ((gate.at_least, "below", 1), (gate.at_most, "above", -1))
        for name, limit in limits.items()
        if name not in own or sign * (limit - own[name]) > 0
    ]
    found += _against_rivals(gate, evidence)
    rise = evidence.forgetting
    if gate.max_forgetting is not None and rise is not None and not rise <= gate.max_forgetting:
        found.append(f"the loss on a general text rises by {rise:.3f}, above {gate.max_forgetting:g}")
    if gate.max_megabytes is not None and evidence.megabytes > gate.max_megabytes:
        found.append(f"{evidence.megabytes:.1f} MB is above {gate.max_megabytes:g} MB")
    for runtime in gate.deployable:
        found += [f"{runtime} cannot serve it: {reason}" for reason in evidence.reasons_against.get(runtime, ())]
    return found


def _against_rivals(gate: GateConfig, evidence: Evidence) -> list[str]:
    own, found = evidence.scores["own"], list[str]()
    metric = compared_by(gate, own)
    for rival in dict.fromkeys([*gate.better_than, *gate.not_worse_than]):
        if rival in evidence.unmet:
            why = not_compared(rival, evidence.unmet[rival])
            found.append(f"{why}; take {rival} out of the gate to be judged without it")
        elif rival not in evidence.rows:
            continue
        elif not math.isfinite(own[metric] - evidence.scores[rival][metric]):
            found.append(f"no difference to {_told(evidence, rival, metric)}")
        else:
            low, high = _gain(gate, evidence, rival, metric)
            if rival in gate.better_than and low <= 0:
                found.append(f"not better than {_told(evidence, rival, metric)} by more than chance")
            if rival in gate.not_worse_than and high < 0:
                found.append(f"worse than {_told(evidence, rival, metric)}")
    return found


def _gain(gate: GateConfig, evidence: Evidence, rival: str, metric: str) -> tuple[float, float]:
    """The interval of how much better an adapter is than a rival, positive where it is better."""
    gap = difference(evidence.rows["own"], evidence.rows[rival], metric, chance=gate.significance)
    if gap is None:  # one row says nothing about chance
        return 0.0, 0.0
    return (-gap[1], -gap[0]) if metric == "loss" else gap


def _told(evidence: Evidence, rival: str, metric: str) -> str:
    own, other = evidence.scores["own"], evidence.scores[rival]
    return f"{rival}: {in_words(metric)} {_figure(metric, own)} against {_figure(metric, other)}"


def _figure(name: str, scores: Mapping[str, float]) -> str:
    return in_figures(name, scores[name]) if name in scores else "(not measured)"
