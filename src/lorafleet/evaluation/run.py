"""``lorafleet eval``: an adapter beside its base, on rows that neither was trained on."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.use import AdapterConfig, EvaluationConfig, GenerationConfig
from lorafleet.data.load import Data, load_data
from lorafleet.data.sources import Source, find_source
from lorafleet.data.store import TokenRow
from lorafleet.errors import ConfigError, DataError
from lorafleet.evaluation.measure import measure, prompt_of, references_of, short_answer
from lorafleet.evaluation.metrics import majority, mcnemar
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.adapter import Adapter
from lorafleet.files.atomic import write_text
from lorafleet.files.method import SavedMethod
from lorafleet.generation.adapted import Adapted, as_trained, load_adapted
from lorafleet.lora import BASE_ONLY
from lorafleet.models.machine import keep_large_allocations
from lorafleet.registry.use import located

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, AdapterConfig, RegistryConfig, DataConfig, EvaluationConfig, GenerationConfig)

_TRAINED_WITH = ("prompt_template", "system_prompt", "loss_on", "labels")
"""Knobs of data that an adapter was trained with, and is evaluated with unless others are given."""

_HELD_OUT_BY = ("valid_fraction", "max_rows", "max_length", "data_format", "on_bad_rows")
"""Knobs that decide which rows of a source its training held out."""


@dataclass(frozen=True)
class EvalResult:
    """Measurements of an adapter and its base on the same rows.

    Attributes:
        model: The base.
        adapter: The adapter's folder, or none.
        data: The rows' source.
        split: Which split was measured.
        rows: Rows measured.
        task: label, chat or text.
        metrics: By ``base`` and ``adapter``: loss (nats per token), perplexity, accuracy, macro_f1, exact_match, and
            bleu, chrf and rouge_l from 0 to 100.
        majority: For label rows the most frequent label and the accuracy of always answering it.
        p_values: McNemar's exact test for label rows: ``adapter_vs_base``, ``adapter_vs_majority``.
        predictions: The file with one line per row, or none.
        warnings: What may make these numbers misleading.
        seconds: From start to end, loading included.
    """

    model: str
    adapter: str | None
    data: str
    split: str
    rows: int
    task: str
    metrics: dict[str, dict[str, float]]
    majority: dict[str, Any] | None
    p_values: dict[str, float]
    predictions: str | None
    warnings: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def evaluate(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> EvalResult:
    """Measure an adapter, and its base beside it, on the same rows.

    Args:
        config: A YAML file, or a mapping of knobs.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are unknown or out of range.
        DataError: The rows cannot be read, or the split is not there.
        AdapterError: The adapter is damaged, does not fit, or was trained on another base or tokenizer.
        ModelError: The base cannot be loaded.
    """
    started = time.perf_counter()
    model_config, adapter_config, registry, data_config, settings, generation = load_sections(SECTIONS, config, knobs)
    _check_knobs(adapter_config, settings)
    keep_large_allocations()
    adapted = load_adapted(model_config, located(adapter_config, registry), data_config.chat_template)
    data_config = as_trained(data_config, adapted.adapter, _TRAINED_WITH)
    data, split, warnings = choose_rows(data_config, settings, adapted)
    rows: list[TokenRow] = list(data.splits[split])
    wants_answers = settings.answers
    if wants_answers is None:
        wants_answers = any(row.references or short_answer(row) is not None for row in rows)
    subjects = {"base": BASE_ONLY} if settings.base or adapted.bank is None else {}
    if adapted.bank is not None:
        subjects["adapter"] = adapted.slot
    metrics: dict[str, dict[str, float]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    loss_model = LossModel(adapted.base.model, adapted.bank, adapted.base.tokenizer.pad_token_id)
    for name, slot in subjects.items():
        logger.info("measuring the %s on %d rows of %s", name, len(rows), split)
        found[name] = []
        metrics[name] = measure(
            adapted.base,
            loss_model,
            slot,
            data,
            rows,
            batch_size=settings.batch_size,
            generation=generation if wants_answers else None,
            predictions=found[name],
        )
    if settings.predictions is not None:
        write_text(settings.predictions, _prediction_lines(adapted, rows, found))
    best, p_values = _significance(data, rows, found)
    return EvalResult(
        model=adapted.base.name,
        adapter=adapter_config.adapter,
        data=data_config.data,
        split=split,
        rows=len(rows),
        task=data.task,
        metrics=metrics,
        majority=best,
        p_values=p_values,
        predictions=settings.predictions,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
    )


def choose_rows(config: DataConfig, settings: EvaluationConfig, adapted: Adapted) -> tuple[Data, str, list[str]]:
    """Load the data and decide which rows to measure on.

    The split that is asked for; without one, test, else valid, else all rows. A single file that the adapter was not
    trained on is measured whole. If it was, the rows that training held out are: by the knobs of that training, unless
    others are given.

    Returns:
        The data, the name of the split, and warnings.

    Raises:
        DataError: The split that was asked for is not there.
    """
    source = find_source(config.data)
    trained_on = _trained_on(source, config, adapted.adapter)
    named = settings.split if "split" in settings.model_fields_set else None
    if trained_on:
        config = as_trained(config, adapted.adapter, ("data_format",))
        if "valid" not in source.splits and (named or ("test" if "test" in source.splits else "valid")) != "test":
            config = as_trained(config, adapted.adapter, _HELD_OUT_BY)
    data = load_data(config, adapted.base.tokenizer)
    warnings = _label_warnings(data, adapted.adapter)
    train = data.report.splits.get("train")
    held_out = train is not None and train.held_out > 0
    if named is not None or "test" in data.splits:
        split = settings.split
        if split not in data.splits:
            raise DataError(f"{config.data} has no split {split!r}; it has {', '.join(data.splits)}")
    elif held_out and "valid_fraction" not in config.model_fields_set and not trained_on:
        data, split = load_data(config.model_copy(update={"valid_fraction": 0.0}), adapted.base.tokenizer), "train"
    else:
        split = "valid" if "valid" in data.splits else "train"
    if trained_on and split == "train":
        warnings.append("these rows were trained on; the numbers say nothing about new ones")
    elif trained_on and split == "valid" and held_out and (others := _other_knobs(config, adapted.adapter)):
        warnings.append(f"some of these rows may have been trained on: training held out others, by {others}")
    return data, split, warnings


def _check_knobs(adapter: AdapterConfig, settings: EvaluationConfig) -> None:
    if adapter.adapter is None and not settings.base:
        raise ConfigError("nothing to measure: name an adapter, or leave base on")
    if settings.predictions is not None and Path(settings.predictions).is_dir():
        raise ConfigError(f"predictions = {settings.predictions!r} is a folder; name a file")


def _trained_on(source: Source, config: DataConfig, adapter: Adapter | SavedMethod | None) -> bool:
    if adapter is None:
        return False
    trained = adapter.metadata.get("data", {}).get("data")
    same_path = trained is not None and Path(trained).absolute() == Path(config.data).absolute()
    return same_path or adapter.metadata.get("source_hash") == source.bytes_hash


def _other_knobs(config: DataConfig, adapter: Adapter | SavedMethod | None) -> str:
    """The knobs of holding out that differ from the adapter's training, with the values they had there."""
    trained = adapter.metadata.get("data", {}) if adapter is not None else {}
    differing = [key for key in _HELD_OUT_BY if key in trained and getattr(config, key) != trained[key]]
    return ", ".join(f"{key} = {trained[key]!r}" for key in differing)


def _label_warnings(data: Data, adapter: Adapter | SavedMethod | None) -> list[str]:
    trained = adapter.metadata.get("labels") if adapter is not None else None
    if data.task != "label" or not trained or list(data.labels) == list(trained):
        return []
    warning = (
        f"these rows have the labels {', '.join(data.labels[:5])}{', …' if len(data.labels) > 5 else ''} "
        f"({len(data.labels)}), the adapter was trained with {', '.join(trained[:5])}"
        f"{', …' if len(trained) > 5 else ''} ({len(trained)})"
    )
    logger.warning("%s", warning)
    return [warning]


def _prediction_lines(
    adapted: Adapted, rows: Sequence[TokenRow], found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """One JSON object a line: the row's place, prompt and references, and what base and adapter predicted."""
    lines = []
    for i, row in enumerate(rows):
        entry: dict[str, Any] = {"source": row.source}
        if row.prompt_length:
            entry["prompt"] = adapted.base.tokenizer.decode(prompt_of(row))
        entry["reference"] = row.reference
        if references_of(row) != [row.reference]:
            entry["references"] = references_of(row)
        lines.append(entry | {name: predictions[i] for name, predictions in found.items()})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _significance(
    data: Data, rows: Sequence[TokenRow], found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """What always answering the most frequent label gives, and whether the adapter beats it and the base."""
    if data.task != "label":
        return None, {}
    label, accuracy = majority([row.reference for row in rows])
    right = {name: [bool(entry["label_right"]) for entry in entries] for name, entries in found.items()}
    right["majority"] = [row.reference == label for row in rows]
    p_values = {
        f"adapter_vs_{other}": mcnemar(right["adapter"], right[other])
        for other in ("base", "majority")
        if "adapter" in right and other in right
    }
    return {"label": label, "accuracy": accuracy}, p_values
