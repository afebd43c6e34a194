"""What is known to go wrong with such rows, and what to try when a run does."""

from collections.abc import Iterator

from lorafleet.advice.facts import Facts


def cautions(facts: Facts, goal: str) -> Iterator[str]:
    """What to look at before training."""
    yield from facts.warnings
    if facts.rows < 100:
        yield f"{facts.rows} rows are few: scores will swing with the seed; more rows help more than any setting"
    if not facts.held_out:
        yield "no rows are held out, so nobody sees when it overfits; raise valid_fraction or add a valid file"
    elif facts.held_out < 50:
        yield f"{facts.held_out} held-out rows tell large differences only"
    if facts.labels:
        most, fewest = max(facts.labels.values()), min(facts.labels.values())
        if most > 0.8 * sum(facts.labels.values()):
            share = most / sum(facts.labels.values())
            yield f"{share:.0%} of the rows have one label, which answering blindly would get right; look at macro F1"
        if fewest < 5:
            few = sum(count < 5 for count in facts.labels.values())
            yield f"{few} labels have fewer than 5 rows; they will hardly be learnt"
    if facts.repeated_prompts > 0.05 and not facts.labels:
        yield (
            f"{facts.repeated_prompts:.0%} of the rows share their prompt with others, so the loss cannot fall to 0; "
            "judge by the text metrics of eval, against all references"
        )
    if goal in ("edge", "many_tasks"):
        where = "llama.cpp" if goal == "edge" else "vLLM"
        yield f"for {where} keep plain LoRA: no DoRA, trained biases, or modules_to_save"


NEXT = (
    "overfits (held-out loss rises while training loss falls): fewer epochs; more rows; lora_dropout 0.1; a smaller r",
    "underfits (both still fall at the end): more epochs; learning_rate × 2; then r × 2 with lora_alpha = 2 r",
    "jumps or becomes NaN: learning_rate / 2; warmup_ratio 0.1",
    "is good enough: lorafleet tune on the same file finds what is left, learning rate first (--space recommended)",
)
"""What to try when a run …"""
