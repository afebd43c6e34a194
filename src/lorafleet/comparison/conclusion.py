"""What a comparison says, in sentences that follow from its numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafleet.comparison.result import FALLING, CompareResult
from lorafleet.evaluation.metrics import in_figures, in_words

Row = Mapping[str, Any]


def conclusion(result: CompareResult) -> list[str]:
    """Who is best, how far the others are behind at what cost, and what is not certain."""
    found = list(_quality(result)) if result.methods else ["No method could be measured."]
    if len(result.methods) > 1:
        found += [_costs(result.methods), *_overfitting(result.methods), *_forgetting(result.methods)]
    return found + [f"{name} could not be measured: {why.splitlines()[0]}" for name, why in result.failed.items()]


def _quality(result: CompareResult) -> Iterator[str]:
    rows, merit = result.methods, result.merit
    best = next(row for row in rows if row["best"])
    before = result.base["quality"][merit]
    yield (
        f"On {result.rows} {result.split} rows {best['name']} has the best {in_words(merit)}: "
        f"{in_figures(merit, best['quality'][merit])}; the base's is {in_figures(merit, before)}"
        f"{', which is within noise of it' if best['as_base'] else ''}."
    )
    equals = [row for row in rows if row["within_noise"]]
    if len(equals) > 1:
        smallest = min(equals, key=lambda row: row["trainable_parameters"])
        yield (
            f"Within noise of it: {_and([row['name'] for row in equals if row is not best])}. Of all these "
            f"{smallest['name']} trains the fewest parameters, {smallest['trainable_parameters']:,}."
        )
    if merit != "loss" and (apart := [row for row in equals if row["by_loss"]["best"]]):
        losses = [f"{row['name']} ({row['quality']['loss']:.3f})" for row in apart]
        own = best["quality"]["loss"]
        yield f"Their loss, which tells more, differs from its {own:.3f} by more than noise: {_and(losses)}."
    full = next((row for row in rows if row["kind"] == "full"), None)
    if full is not None:
        yield from (_beside_full(row, full, result.base["quality"], merit) for row in rows if row["kind"] == "lora")


def _beside_full(row: Row, full: Row, base: Mapping[str, float], merit: str) -> str:
    """A share of full fine-tuning's gain where there is one beyond noise; else both in numbers.

    What a merit of a few rows cannot tell apart, loss may.
    """
    if merit != "loss" and row["as_base"] and full["as_base"] and row["by_loss"]["base"] and full["by_loss"]["base"]:
        by_loss = {"as_base": False}
        lora = {**row, **by_loss, "as_full": not row["by_loss"]["full"]}
        return f"By loss {_beside_full(lora, {**full, **by_loss}, base, 'loss')}"
    before = base[merit]
    sign = -1 if merit in FALLING else 1
    gain, whole = (sign * (one["quality"][merit] - before) for one in (row, full))
    share = row["trainable_parameters"] / full["trainable_parameters"]
    name = f"{row['name']}, with {share:.2%} of the trained parameters,"
    if whole > 0 and not full["as_base"] and gain > 0:
        noise = "; the two are within noise of each other" if row["as_full"] else ""
        return f"{name} reached {gain / whole:.1%} of full fine-tuning's gain{noise}."
    values = [in_figures(merit, one["quality"][merit]) for one in (full, row)]
    if whole > 0 and not full["as_base"]:
        return f"{name} gained nothing: {values[1]} beside full fine-tuning's {values[0]}."
    if gain > 0 and not row["as_base"]:
        return f"{name} gained what full fine-tuning did not: {values[1]} beside {values[0]}."
    return f"Neither full fine-tuning ({values[0]}) nor {row['name']} ({values[1]}) gained anything beyond noise."


def _costs(rows: Sequence[Row]) -> str:
    padded = any(row["padded"] for row in rows)
    key = "padded_tokens_per_second" if padded else "training_tokens_per_second"
    fast, slow = max(rows, key=lambda row: row[key]), min(rows, key=lambda row: row[key])
    light = min(rows, key=lambda row: row["training_peak_bytes"])
    heavy = max(rows, key=lambda row: row["training_peak_bytes"])
    return (
        f"{fast['name']} trains fastest{' in padded batches' if padded else ''}, {fast[key] / slow[key]:.1f} times as "
        f"fast as {slow['name']}; {light['name']} needs the least memory for it, "
        f"{light['training_peak_bytes'] / heavy['training_peak_bytes']:.0%} of {heavy['name']}'s."
    )


def _overfitting(rows: Sequence[Row]) -> Iterator[str]:
    """By the fewest rows that all were trained on."""
    gaps = {row["name"]: gap_of(row["gaps"][0]) for row in rows}
    known = {name: gap for name, gap in gaps.items() if gap is not None}
    few = rows[0]["gaps"][0]["rows"]
    if len(known) < 2 or any(row["gaps"][0]["rows"] != few for row in rows):
        return
    most, least = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    if known[most] <= 0:
        yield f"Trained as long on {few} rows, none overfits."
    else:
        yield (
            f"Trained as long on {few} rows, {most} overfits most: held-out loss {known[most]:+.3f} over that of the "
            f"rows it saw; {least} least ({known[least]:+.3f})."
        )


def _forgetting(rows: Sequence[Row]) -> Iterator[str]:
    most, least = max(rows, key=lambda row: row["forgetting"]), min(rows, key=lambda row: row["forgetting"])
    if most["forgetting"] > 0:
        yield (
            f"On text of another kind {most['name']} forgets most (its loss there rises by {most['forgetting']:.3f}), "
            f"{least['name']} least ({least['forgetting']:+.3f})."
        )


def gap_of(losses: Mapping[str, Any]) -> float | None:
    """Held-out loss less that of the rows that were seen; none where training came to no number."""
    if losses["train_loss"] is None or losses["eval_loss"] is None:
        return None
    return float(losses["eval_loss"] - losses["train_loss"])


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
