"""What a run leaves behind: settings, adapter, tokenizer, model card, plot, and the numbers of ``--json``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.knob import Section
from lorafleet.config.load import dump_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import MethodConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig, ValidationConfig
from lorafleet.data.load import Data
from lorafleet.files.atomic import write_json, write_text
from lorafleet.files.run_folder import METRICS, RESULT, SETTINGS, TEMPLATE, lora_shape, model_card, provenance
from lorafleet.methods.method import Method
from lorafleet.methods.saved import write_method
from lorafleet.models.load import Base
from lorafleet.models.machine import peak_memory_bytes
from lorafleet.training.member import Member
from lorafleet.training.plot import plot_losses

Settings = tuple[ModelConfig, DataConfig, MethodConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig]


@dataclass(frozen=True)
class TrainResult:
    """What was trained, on what, how well and how fast.

    Attributes:
        output_dir: The run folder.
        method: What trained: ``lora``, ``full``, ``bottleneck``, …
        adapter: The folder to load: the run folder itself as an adapter, or of a model that was trained whole its own.
        steps: Optimizer steps taken.
        best_step: The step whose adapter was kept.
        rows: Rows of the training split: read, used, rejected, truncated.
        tokens: Tokens of the rows that were trained on, prompts included, also those computed once for several rows.
        trained_tokens: Tokens among them that were targets.
        train_loss: Mean loss over all steps, in nats per trained token.
        eval_loss_before: The base's loss on held-out rows.
        eval_loss: The adapter's.
        metrics_before: The base's measurements on held-out rows.
        metrics: The adapter's.
        total_parameters: Parameters of the base.
        trainable_parameters: Parameters that were trained.
        optimizer_bytes: Of AdamW's two moments.
        tokens_per_second: Tokens processed over the time spent in training steps.
        peak_memory_bytes: Most memory that the process has held.
        seconds: Wall time of this call.
    """

    output_dir: str
    method: str
    adapter: str
    steps: int
    best_step: int
    rows: dict[str, int]
    tokens: int
    trained_tokens: int
    train_loss: float
    eval_loss_before: float | None
    eval_loss: float | None
    metrics_before: dict[str, float]
    metrics: dict[str, float]
    total_parameters: int
    trainable_parameters: int
    optimizer_bytes: int
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return asdict(self)


def write_settings(output_dir: Path, settings: Sequence[Section]) -> None:
    """Write the resolved settings, runnable again as they are, and what made the run.

    Resuming and overwriting are what one call was allowed to do, not settings of the run.
    """
    once = {"overwrite": False, "resume_from_checkpoint": False}
    plain = [one.model_copy(update=once) if isinstance(one, RunConfig) else one for one in settings]
    write_text(output_dir / SETTINGS, dump_sections(*plain))
    write_json(output_dir / "provenance.json", provenance())


def write_results(
    output_dir: Path,
    base: Base,
    member: Member,
    method: Method,
    data: Data,
    settings: Settings,
    measured: tuple[Mapping[str, float], Mapping[str, float]],
    started: float,
) -> TrainResult:
    """Write the adapter and everything that belongs beside it.

    Args:
        output_dir: The run folder.
        base: The base.
        member: What has trained.
        method: Its method.
        data: What it was trained on.
        settings: The run's sections.
        measured: Held-out measurements before and after.
        started: ``time.perf_counter()`` at the start of the run.
    """
    before, after = measured
    data_config, validation = settings[1], settings[5]
    kept_best = validation.load_best_model_at_end and member.progress.best_loss is not None
    best_step = member.progress.best_step if kept_best else member.progress.step
    trained = write_trained(output_dir, base, member, method, data, data_config, after)
    result = _result(output_dir, trained, base, member, method, best_step, data, (dict(before), dict(after)), started)
    plot_losses(output_dir / METRICS, output_dir / "loss.png", f"{output_dir.name}: loss", result.eval_loss_before)
    _write_card(output_dir, base, method, data_config, result)
    write_json(output_dir / RESULT, result.as_dict())
    return result


def write_trained(
    folder: Path,
    base: Base,
    member: Member,
    method: Method,
    data: Data,
    data_config: DataConfig,
    metrics: Mapping[str, float],
) -> Path:
    """Write what a member has learned with all that using it needs: tokenizer, template, and where it came from.

    Returns:
        The folder to use it from.
    """
    metadata = {
        "base_weights_hash": base.weights_hash,
        "tokenizer_hash": base.tokenizer_hash,
        "data_hash": data.data_hash,
        "source_hash": data.source_hash,
        "data": data_config.model_dump(mode="json", exclude_none=True),
        "labels": list(data.labels),
        "steps": member.progress.step,
        "metrics": dict(metrics),
    }
    trained = write_method(folder, base, method, member.bank, member.slot, metadata)
    for name, content in base.tokenizer_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_text(folder / TEMPLATE, data.chat_template)
    return trained


def _result(
    output_dir: Path,
    trained: Path,
    base: Base,
    member: Member,
    method: Method,
    best_step: int,
    data: Data,
    measured: tuple[dict[str, float], dict[str, float]],
    started: float,
) -> TrainResult:
    trainable = sum(one.value.numel() for one in member.parameters.values())
    adapted = 0 if method.kind == "full" else sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    progress, (before, after), split = member.progress, measured, data.report.splits["train"]
    return TrainResult(
        output_dir=str(output_dir),
        method=method.kind,
        adapter=str(trained),
        steps=progress.step,
        best_step=best_step,
        rows={"read": split.read, "used": split.used, "rejected": split.rejected, "truncated": split.truncated},
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        train_loss=member.train_loss,
        eval_loss_before=before.get("loss"),
        eval_loss=after.get("loss"),
        metrics_before=before,
        metrics=after,
        total_parameters=sum(p.numel() for p in base.model.parameters()) - adapted,
        trainable_parameters=trainable,
        optimizer_bytes=2 * sum(view.nbytes for view in member.views),
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(base.device),
        seconds=time.perf_counter() - started,
    )


def _write_card(output_dir: Path, base: Base, method: Method, data: DataConfig, result: TrainResult) -> None:
    facts = {
        "steps": result.steps,
        "kept from step": result.best_step,
        "rows": result.rows["used"],
        "tokens processed": result.tokens,
        "tokens trained": result.trained_tokens,
        "training loss": round(result.train_loss, 4),
        "trainable parameters": result.trainable_parameters,
        "of the base's": f"{result.trainable_parameters / result.total_parameters:.2%}",
        "tokens per second": round(result.tokens_per_second, 1),
        "peak memory (MiB)": result.peak_memory_bytes // 2**20,
    }
    card = model_card(
        title=output_dir.resolve().name,
        base_name=base.name,
        shape=lora_shape(method.config) if isinstance(method.config, LoraConfig) else method.options,
        data=Path(data.data).name,
        metrics_before=result.metrics_before,
        metrics=result.metrics,
        facts=facts,
        made_by=provenance(),
        kind=method.kind,
    )
    write_text(output_dir / "README.md", card)
