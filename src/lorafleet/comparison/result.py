"""What a comparison has measured, put together from what each part has left."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.comparison.folder import METHODS
from lorafleet.comparison.jobs import GENERAL
from lorafleet.comparison.quality import difference, text_tests, within_noise
from lorafleet.config.data import DataConfig
from lorafleet.config.model import ModelConfig
from lorafleet.data.load import Data
from lorafleet.models.source import find_source

MERITS = ("accuracy", "chrf", "exact_match", "loss")
"""By which of these methods are ranked: the first that the rows can give. Long texts hardly ever match exactly."""

FALLING = ("loss", "perplexity")

BASE = "base"


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
        base: The base as it is: ``quality``, ``intervals``, ``speed``, ``general_loss``, ``dtype``, …
        methods: One mapping for each method, those with more trained parameters first. ``best``: whether it is;
            ``within_noise``, ``as_base``, ``as_full``: whether chance makes it differ so much from the best, from the
            base, and from full fine-tuning; ``by_loss``: whether its loss differs from theirs by more than that;
            ``gaps``: losses on the rows that were seen and on held-out ones, after
            training as long on few rows and, last, after training on all.
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
    _rank(base, measured, merit)
    _test_texts(base, measured)
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
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in place.glob("*.json")}


def _row(parts: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """One method's numbers under the names of the table."""
    method, train, use = parts["method"], parts["train"], parts["use"]
    small = [part for name, part in parts.items() if name.startswith("small-")]
    return {
        "name": method["name"],
        "kind": method["kind"],
        "options": method["options"],
        "rates": parts.get("rate"),
        "trainable_parameters": train["trainable_parameters"],
        "trainable_share": train["trainable_parameters"] / train["total_parameters"],
        "optimizer_bytes": train["optimizer_bytes"],
        "training_peak_bytes": train["process_peak_bytes"],
        "steps": train["steps"],
        "tokens": train["tokens"],
        "training_tokens_per_second": train["tokens_per_second"],
        "padded_tokens_per_second": parts["padded"]["tokens_per_second"],
        "training_seconds": train["tokens"] / train["tokens_per_second"],
        "curve": train["curve"],
        "storage_bytes": use["storage_bytes"],
        "load_seconds": use["load_seconds"],
        "speed": use["speed"],
        "merged_speed": use.get("merged_speed"),
        "padded": use["padded"],
        "quality": use["quality"],
        "intervals": use["intervals"],
        "rows": use["rows"],
        "general_loss": use["general_loss"],
        "forgetting": use["general_loss"] - base["general_loss"],
        "gaps": [
            *({name: part[name] for name in ("rows", "train_loss", "eval_loss")} for part in _by_rows(small)),
            {"rows": train["rows"]["used"], "train_loss": use["train_loss"], "eval_loss": train["metrics"]["loss"]},
        ],
    }


def _by_rows(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(parts, key=lambda part: part["rows"])


def _rank(base: dict[str, Any], measured: list[dict[str, Any]], merit: str) -> None:
    """Note for each method how far it is from the best by the merit, and from whom chance alone may set it apart."""
    if not measured:
        return
    sign = -1 if merit in FALLING else 1
    # Of equal ones the smallest, which stands last.
    best = max(reversed(measured), key=lambda row: sign * row["quality"][merit])
    full = next((row for row in measured if row["kind"] == "full"), None)
    for row in measured:
        row["best"] = row is best
        row["behind_best"] = None if row is best or merit == "chrf" else difference(row["rows"], best["rows"], merit)
        row["within_noise"] = row is best or within_noise(row["rows"], best["rows"], merit)
        row["as_base"] = within_noise(row["rows"], base["rows"], merit)
        row["as_full"] = None if full is None else row is full or within_noise(row["rows"], full["rows"], merit)
        rivals = {"best": best, BASE: base} | ({} if full is None else {"full": full})
        row["by_loss"] = {
            name: row is not rival and not within_noise(row["rows"], rival["rows"], "loss")
            for name, rival in rivals.items()
        }


def _test_texts(base: dict[str, Any], measured: list[dict[str, Any]]) -> None:
    """Intervals of BLEU and chrF, and how likely chance alone sets a method so far behind the best."""
    references = base["rows"].get("references")
    if not references or not measured:
        return
    best = next(row["name"] for row in measured if row["best"])
    texts = {row["name"]: row["rows"]["texts"] for row in measured}
    found = text_tests({**texts, BASE: base["rows"]["texts"]}, references, best)
    for name, row in ((BASE, base), *((row["name"], row) for row in measured)):
        row["intervals"] |= found[name].intervals
        row["p_values"] = found[name].p_values
