"""What is known to go wrong with such rows, and what to try when a run does."""

from collections.abc import Iterator

from lorafleet.advice.facts import Facts

_MOST = 0.8
"""Share of the free memory that a base may take, so that there is room to train."""


def cautions(facts: Facts, goal: str) -> Iterator[str]:
    """What to look at before training."""
    yield from facts.warnings
    if facts.rows < 100:
        yield f"{facts.rows} rows are few: scores will swing with the seed; more rows help more than any setting"
    if facts.base_bytes > _MOST * facts.free_bytes:
        yield (
            f"the base alone takes {facts.base_bytes / 1e9:.1f} GB, and {facts.free_bytes / 1e9:.1f} GB are free "
            f"({facts.device}); lorafleet estimate on the same file tells what fits where"
        )
    if facts.context is not None and facts.longest > facts.context:
        yield f"rows have up to {facts.longest} tokens, the model takes {facts.context}; set max_length to that"
    if 0 < facts.held_out < 50:
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
    "runs out of memory: --goal memory; a smaller max_length; lorafleet estimate on the same file",
    "is good enough: lorafleet tune on the same file finds what is left, learning rate first (--space recommended)",
)
"""What to try when a run …"""
