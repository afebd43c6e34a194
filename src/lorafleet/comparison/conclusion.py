"""What a comparison says, in sentences that follow from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorafleet.comparison.result import FALLING, CompareResult
from lorafleet.evaluation.metrics import in_figures

Row = Mapping[str, Any]


def conclusion(result: CompareResult) -> list[str]:
    """Who is best, how far the others are behind at what cost, and what is not certain."""
    if not result.methods:
        return ["No method could be measured."]
    merit = result.merit
    best = next(row for row in result.methods if row["best"])
    before = result.base["quality"][merit]
    found = [
        f"On {result.rows} {result.split} rows {best['name']} has the best {_word(merit)}: "
        f"{in_figures(merit, best['quality'][merit])}; the base's is {in_figures(merit, before)}."
    ]
    near = [row["name"] for row in result.methods if row["within_noise"] and not row["best"]]
    if near:
        found.append(f"Within noise of it: {_and(near)}. Of these the smallest or fastest is the better choice.")
    full = next((row for row in result.methods if row["kind"] == "full"), None)
    if full is not None:
        found += [_beside_full(row, full, before, merit) for row in result.methods if row["kind"] == "lora"]
    found += _costs(result.methods)
    found += _overfitting(result.methods)
    forgetting = [row for row in result.methods if row["forgetting"] > 0]
    if forgetting:
        most = max(forgetting, key=lambda row: row["forgetting"])
        least = min(result.methods, key=lambda row: row["forgetting"])
        found.append(
            f"On text of another kind {most['name']} forgets most (its loss there rises by {most['forgetting']:.3f}), "
            f"{least['name']} least ({least['forgetting']:+.3f})."
        )
    for name, why in result.failed.items():
        found.append(f"{name} could not be measured: {why.splitlines()[0]}")
    return found


def _beside_full(row: Row, full: Row, before: float, merit: str) -> str:
    gain, whole = row["quality"][merit] - before, full["quality"][merit] - before
    sign = -1 if merit in FALLING else 1
    cost = f"{row['trainable_parameters'] / full['trainable_parameters']:.2%} of its trained parameters"
    if sign * whole <= 0:
        return f"Full fine-tuning gained nothing that {row['name']}, with {cost}, could be compared with."
    noise = " The two are within noise of each other." if row["within_noise"] and full["within_noise"] else ""
    return f"{row['name']} reached {gain / whole:.1%} of full fine-tuning's gain with {cost}.{noise}"


def _costs(rows: Sequence[Row]) -> list[str]:
    if len(rows) < 2:
        return []
    key = "training_tokens_per_second"
    if all(row["padded_tokens_per_second"] for row in rows):
        key = "padded_tokens_per_second"
    fast, slow = max(rows, key=lambda row: row[key]), min(rows, key=lambda row: row[key])
    ratio = fast[key] / slow[key]
    how = " in padded batches" if key.startswith("padded") else ""
    light = min(rows, key=lambda row: row["training_peak_bytes"])
    heavy = max(rows, key=lambda row: row["training_peak_bytes"])
    return [
        f"{fast['name']} trains fastest{how}, {ratio:.1f} times as fast as {slow['name']}; {light['name']} needs the "
        f"least memory for it, {light['training_peak_bytes'] / heavy['training_peak_bytes']:.0%} of {heavy['name']}'s."
    ]


def _overfitting(rows: Sequence[Row]) -> list[str]:
    gaps = {row["name"]: _gap(row["gaps"][1]) for row in rows if len(row["gaps"]) > 1}
    known = {name: gap for name, gap in gaps.items() if gap is not None}
    if len(known) < 2:
        return []
    few = next(row["gaps"][1]["rows"] for row in rows if len(row["gaps"]) > 1)
    most, least = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    return [
        f"Trained as long on {few} rows, {most} overfits most: held-out loss {known[most]:+.3f} over that of the rows "
        f"it saw; {least} least ({known[least]:+.3f})."
    ]


def _gap(losses: Mapping[str, Any]) -> float | None:
    if losses["train_loss"] is None or losses["eval_loss"] is None:
        return None
    return float(losses["eval_loss"] - losses["train_loss"])


def _word(merit: str) -> str:
    return {"exact_match": "exact match", "chrf": "chrF"}.get(merit, merit)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
