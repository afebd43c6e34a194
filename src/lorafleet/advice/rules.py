"""Which settings suit which facts. Each rule sets knobs, and says why and who found that out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafleet.advice.facts import Facts
from lorafleet.data.batches import Schedule

REGRET = "Schulman et al. 2025, LoRA Without Regret"
CHEN = "Chen et al. 2016, arXiv 1604.06174"
MEASURED = "docs/evidence.md"
PRACTICE = "common practice"

BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

SHORT_RUN = 200
"""Optimizer steps under which a run is short."""


@dataclass(frozen=True)
class Choice:
    """One knob of the advice.

    Attributes:
        knob: Its name.
        value: Its value.
        reason: Why, with the numbers that decided.
        source: Who found that out.
    """

    knob: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True)
class Case:
    """What a rule decides by.

    Attributes:
        facts: The model, the rows, the machine.
        goal: What matters most.
        given: Knobs that the user has set.
        chosen: Knobs that are settled: these, those of the rules before, and defaults.
    """

    facts: Facts
    goal: str
    given: Mapping[str, Any]
    chosen: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, as far as it is settled."""
        batch_size, accumulation = (int(self.chosen[name]) for name in (BATCH, ACCUMULATION))
        schedule = Schedule(self.facts.rows, batch_size, accumulation, seed=0)
        return schedule.total_steps(float(self.chosen["num_train_epochs"]), self.chosen.get("max_steps"))


def batch(case: Case) -> Iterator[Choice]:
    """Rows of a step: LoRA takes small steps better; memory decides how many rows go at a time."""
    rows = 4 if case.facts.rows < 200 else 16 if case.facts.rows > 20_000 and case.facts.mean_tokens < 64 else 8
    why = (
        f"{case.facts.rows:,} rows of {case.facts.mean_tokens:.0f} tokens; LoRA loses more than others by large batches"
    )
    at_once = max(1, rows // 4) if case.goal == "memory" else rows
    yield Choice(BATCH, at_once, why, REGRET)
    if at_once < rows and BATCH not in case.given:
        yield Choice(ACCUMULATION, rows // at_once, f"{rows} rows a step, {at_once} at a time: less memory", PRACTICE)
    if case.goal == "memory":
        yield Choice("gradient_checkpointing", True, "activations are computed again instead of kept: slower", CHEN)


def epochs(case: Case) -> Iterator[Choice]:
    """Passes over the rows: few rows want several, and the held-out loss says when to stop."""
    if case.chosen.get("max_steps"):
        return
    rows = case.facts.rows
    count = 5 if rows < 300 else 3 if rows < 3000 else 2 if rows < 20_000 else 1
    if case.goal == "speed":
        count = max(1, count - 1)
    yield Choice("num_train_epochs", count, f"{rows:,} rows; the best of all evaluations is kept", PRACTICE)


def stopping(case: Case) -> Iterator[Choice]:
    """When to evaluate, and when to stop for nothing is gained."""
    asked = case.given.get("eval_strategy", "steps")
    if case.facts.held_out and case.steps >= 20 and asked != "no":
        if asked == "steps":
            every = max(5, case.steps // 10)
            yield Choice("eval_strategy", "steps", "several looks at the held-out loss find its lowest point", PRACTICE)
            yield Choice("eval_steps", every, f"of {case.steps:,} steps", PRACTICE)
        yield Choice("early_stopping_patience", 3, "three looks without gain: what follows is overfitting", PRACTICE)


def learning_rate(case: Case) -> Iterator[Choice]:
    """5e-5 · 10 · (2000 / hidden size)^p for LoRA, half as much again in short runs, never below the default."""
    exponent = 0.0775 if case.facts.architecture.startswith("qwen") else 0.781
    rate = 5e-4 * (2000 / case.facts.hidden_size) ** exponent
    short = case.steps < SHORT_RUN
    if short:
        rate *= 1.5
    rate = float(f"{min(max(rate, 2e-4), 2e-3):.1e}")
    why = f"hidden size {case.facts.hidden_size}: smaller models take larger steps"
    yield Choice("learning_rate", rate, why + (f"; {case.steps} steps are a short run" if short else ""), REGRET)


def rank(case: Case) -> Iterator[Choice]:
    """The rank: as many trained numbers as trained tokens, at least; small where files or memory count."""
    facts = case.facts
    needed = next((r for r in (8, 16, 32) if r * facts.parameters_per_rank >= facts.trained_tokens), 64)
    if case.goal in ("memory", "edge", "many_tasks"):
        yield Choice(
            "r", needed // 2, f"{case.goal}: half as many numbers to hold; r = 2 lost nothing in short runs", MEASURED
        )
    else:
        numbers = needed * facts.parameters_per_rank
        why = f"{numbers:,} trained numbers for {facts.trained_tokens:,} trained tokens"
        yield Choice("r", needed, why, REGRET)


def scale(case: Case) -> Iterator[Choice]:
    """Alpha: for a scale of 2, at which the learning rate was chosen."""
    r = int(case.chosen["r"])
    alpha = round(2 * r**0.5, 2) if case.chosen["use_rslora"] else 2 * r
    yield Choice("lora_alpha", alpha, "a scale of 2, whatever the rank", PRACTICE)


def targets(case: Case) -> Iterator[Choice]:
    """Where the adapter goes."""
    yield Choice("target_modules", "all-linear", "attention alone and MLP alone had a higher loss", MEASURED)


def length(case: Case) -> Iterator[Choice]:
    """Longer rows where rows were cut; a bound where all are short."""
    facts, now = case.facts, int(case.chosen["max_length"])
    if facts.truncated and (facts.context is None or facts.context > now):
        why = f"{facts.truncated:,} rows were cut at {now}"
        yield Choice("max_length", min(2 * now, facts.context or 2 * now), why, PRACTICE)


def regularisation(case: Case) -> Iterator[Choice]:
    """Dropout and weight decay stay off."""
    yield Choice("lora_dropout", 0.0, "0.1 and 0.2 gained nothing", MEASURED)
    yield Choice("weight_decay", 0.0, "0.1 changed nothing", MEASURED)


RULES: tuple[Callable[[Case], Iterator[Choice]], ...] = (
    batch,
    epochs,
    stopping,
    rank,
    scale,
    targets,
    learning_rate,
    length,
    regularisation,
)
"""In the order in which they decide: a later one sees what the earlier ones chose."""


def decide(facts: Facts, goal: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Choice]:
    """Let every rule choose; what the user has given stays.

    Args:
        facts: What the rules go by.
        goal: What matters most.
        given: Knobs that the user has set.
        defaults: Of all knobs.
    """
    chosen, choices = {**defaults, **given}, []
    for rule in RULES:
        for choice in rule(Case(facts, goal, given, chosen)):
            if choice.knob not in given:
                chosen[choice.knob] = choice.value
                choices.append(choice)
    return choices
