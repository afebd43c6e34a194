"""What a comparison has measured, put together from what each part has left."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.comparison.folder import METHODS
from lorafleet.comparison.jobs import GENERAL
from lorafleet.comparison.quality import difference, text_tests
from lorafleet.config.data import DataConfig
from lorafleet.config.model import ModelConfig
from lorafleet.data.load import Data
from lorafleet.models.source import find_source

MERITS = ("accuracy", "exact_match", "chrf", "loss")
"""By which of these methods are ranked: the first that the rows can give."""

FALLING = ("loss", "perplexity")

BASE = "base"
CHANCE = 0.05
"""A difference that chance makes more often than so is within noise."""

_PARTS = ("method", "rate", "train", "small", "padded", "use", "error")


@dataclass(frozen=True)
class CompareResult:
    """Methods beside each other.

    Attributes:
        output_dir: The folder, with ``report.html``, ``report.md`` and ``results.json``.
        model: The base.
        data: The rows' source.
        split: Which split quality was measured on.
        rows: How many of its rows.
        merit: The metric that methods are ranked by.
        forgetting_text: What forgetting was measured on.
        base: The base as it is: ``quality``, ``intervals``, ``speed``, ``general_loss``, ``process_peak_bytes``.
        methods: One mapping for each method, those with more trained parameters first; see ``docs/cli.md``.
        failed: Methods that could not be measured, with the reason.
    """

    output_dir: str
    model: str
    data: str
    split: str
    rows: int
    merit: str
    forgetting_text: str
    base: dict[str, Any]
    methods: tuple[dict[str, Any], ...]
    failed: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def gather(folder: Path, model: ModelConfig, data_config: DataConfig, data: Data) -> CompareResult:
    """Read all parts of all methods in a comparison's folder."""
    base = _read(folder / METHODS / "base")["use"]
    measured, failed = [], {}
    for place in sorted((folder / METHODS).iterdir()):
        parts = _read(place)
        if "use" in parts and "method" in parts:
            measured.append(_row(parts, base))
        elif "error" in parts:
            failed[parts["method"]["name"]] = parts["error"]["error"]
    measured.sort(key=lambda row: -row["trainable_parameters"])
    merit = next(name for name in MERITS if name in base["quality"])
    _against_best(measured, merit)
    _test_texts(base, measured, merit)
    split = "test" if "test" in data.splits else "valid"
    for one in (base, *measured):
        one.pop("rows")
    return CompareResult(
        output_dir=str(folder),
        model=find_source(model).name,
        data=data_config.data,
        split=split,
        rows=base["tested_rows"],
        merit=merit,
        forgetting_text=GENERAL,
        base=base,
        methods=tuple(measured),
        failed=failed,
    )


def _read(place: Path) -> dict[str, Any]:
    paths = {part: place / f"{part}.json" for part in _PARTS}
    return {part: json.loads(path.read_text(encoding="utf-8")) for part, path in paths.items() if path.exists()}


def _row(parts: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """One method's numbers under the names of the table."""
    method, train, use = parts["method"], parts["train"], parts["use"]
    return {
        "name": method["name"],
        "kind": method["kind"],
        "options": method["options"],
        "rates": parts.get("rate"),
        "trainable_parameters": train["trainable_parameters"],
        "trainable_share": train["trainable_parameters"] / train["total_parameters"],
        "optimizer_bytes": 2 * 4 * train["trainable_parameters"],
        "training_peak_bytes": train["process_peak_bytes"],
        "steps": train["steps"],
        "tokens": train["tokens"],
        "training_tokens_per_second": train["tokens_per_second"],
        "padded_tokens_per_second": _padded_speed(parts),
        "training_seconds": train["seconds"],
        "curve": train["curve"],
        "storage_bytes": use["storage_bytes"],
        "load_seconds": use["load_seconds"],
        "speed": use["speed"],
        "merged_speed": use.get("merged_speed"),
        "padded": use["padded"],
        "quality": use["quality"],
        "intervals": use["intervals"],
        "rows": use["rows"],
        "forgetting": use["general_loss"] - base["general_loss"],
        "gaps": [
            {"rows": train["rows"]["used"], "train_loss": use["train_rows_loss"], "eval_loss": use["quality"]["loss"]},
            *([parts["small"]] if "small" in parts else []),
        ],
    }


def _padded_speed(parts: Mapping[str, Any]) -> float | None:
    """Training speed with padded batches; none where no method of the comparison needs them."""
    if parts["use"]["padded"]:
        return float(parts["train"]["tokens_per_second"])
    return float(parts["padded"]["tokens_per_second"]) if "padded" in parts else None


def _against_best(measured: list[dict[str, Any]], merit: str) -> None:
    """Note for each method how far it is from the best by the merit, and whether that is within noise."""
    if not measured:
        return
    sign = -1 if merit in FALLING else 1
    best = max(measured, key=lambda row: sign * row["quality"][merit])
    for row in measured:
        gap = None
        if row is not best and merit in ("loss", "accuracy", "exact_match"):
            gap = difference(row["rows"], best["rows"], merit)
        row["best"] = row is best
        row["behind_best"] = gap
        row["within_noise"] = row is best or (gap is not None and gap[0] <= 0 <= gap[1])


def _test_texts(base: dict[str, Any], measured: list[dict[str, Any]], merit: str) -> None:
    """Intervals of BLEU and chrF; where chrF is the merit, whether a method is behind the best by more than chance."""
    references = base["rows"].get("references")
    if not references or not measured:
        return
    best = next(row for row in measured if row["best"])
    texts = {row["name"]: row["rows"]["texts"] for row in measured}
    found = text_tests({**texts, BASE: base["rows"]["texts"]}, references, best["name"])
    base["intervals"] |= found[BASE].intervals
    for row in measured:
        test = found[row["name"]]
        row["intervals"] |= test.intervals
        if merit == "chrf":
            row["p_value"] = test.p_values.get(merit)
            row["within_noise"] = row is best or test.p_values[merit] >= CHANCE
