"""``lorafleet quickstart``: the whole life of one adapter in minutes, on a small model and data, without network."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lorafleet
from lorafleet.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    load_sections,
)

if TYPE_CHECKING:
    from lorafleet.evaluation.run import EvalResult
    from lorafleet.export.merged import MergeResult
    from lorafleet.generation.run import GenerateResult
    from lorafleet.training.result import TrainResult

logger = logging.getLogger(__name__)

KNOBS: Mapping[str, Any] = {
    "model_name_or_path": "smollm2-135m",
    "data": "sample:movie_polarity",
    "output_dir": "runs/quickstart",
    "r": 8,
    "lora_alpha": 16.0,
    "learning_rate": 5e-4,
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 8,
    "max_steps": 100,
    "eval_strategy": "no",
    "max_eval_rows": 100,
}
"""What quickstart sets; everything else is train's default."""

REVIEWS = (
    "a warm and funny film that stays with you long after the lights come up .",
    "two hours of noise , and not one moment that feels true .",
    "it could have been a mess ; instead it is one of the year's quiet pleasures .",
)


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart made.

    Attributes:
        train: The training run, as ``lorafleet train`` reports it.
        evaluation: Base and adapter on the test rows, as ``lorafleet eval`` reports them.
        generation: Three answers of each, as ``lorafleet generate`` reports them.
        merged: The merged model and its check, as ``lorafleet merge`` reports them.
        adapter_sha256: Hash of the adapter's weights; the same after every run on one machine.
    """

    train: "TrainResult"
    evaluation: "EvalResult"
    generation: "GenerateResult"
    merged: "MergeResult"
    adapter_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """All results in JSON's types."""
        return {
            "train": self.train.as_dict(),
            "evaluation": self.evaluation.as_dict(),
            "generation": self.generation.as_dict(),
            "merged": self.merged.as_dict(),
            "adapter_sha256": self.adapter_sha256,
        }


def quickstart(**knobs: Any) -> QuickstartResult:
    """Train on film reviews, measure base and adapter on the test rows, let both answer, merge and verify.

    Args:
        knobs: Knobs of ``lorafleet.train``; they override ``KNOBS``. An earlier run in its own folder is replaced; one
            in another ``output_dir`` only with ``overwrite``.

    Returns:
        The results of the four steps.
    """
    run = load_sections(
        (ModelConfig, DataConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig), KNOBS, knobs
    )[-1]
    replaces = run.output_dir == KNOBS["output_dir"] and not run.resume_from_checkpoint
    if replaces and "overwrite" not in run.model_fields_set:
        knobs["overwrite"] = True
    overwrite = replaces or run.overwrite or bool(run.resume_from_checkpoint)
    logger.info("1/4 training an adapter")
    trained = lorafleet.train(KNOBS, **knobs)
    folder = Path(trained.output_dir)
    logger.info("2/4 measuring base and adapter on the test rows")
    evaluated = lorafleet.evaluate(
        adapter=trained.adapter, data=KNOBS["data"], predictions=str(folder / "predictions.jsonl")
    )
    logger.info("3/4 answering three new reviews")
    generated = lorafleet.generate(adapter=trained.adapter, prompt=_questions(), base=True, max_new_tokens=12)
    logger.info("4/4 merging the adapter into its base")
    merged = lorafleet.merge(adapter=trained.adapter, output_dir=str(folder / "merged"), overwrite=overwrite)
    weights = (Path(trained.adapter) / "adapter_model.safetensors").read_bytes()
    return QuickstartResult(trained, evaluated, generated, merged, hashlib.sha256(weights).hexdigest())


def _questions() -> list[str]:
    """The reviews, asked as the rows of the data set are."""
    from lorafleet.data.labels import LabelPrompt

    prompt = LabelPrompt(("negative", "positive"))
    return [prompt.question(review) for review in REVIEWS]
