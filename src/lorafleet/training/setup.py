"""What every run does before it trains, alone or as a search: the machine, the held-out rows, its identity."""

from collections.abc import Mapping
from typing import Any

import torch

from lorafleet.config.data import DataConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.data.load import Data
from lorafleet.data.store import TokenRow, sample
from lorafleet.errors import ConfigError
from lorafleet.models.load import Base
from lorafleet.models.machine import keep_large_allocations
from lorafleet.training.report import require_trackers


def check_run(model: ModelConfig, run: RunConfig) -> None:
    """Stop at what no run can do, before anything is loaded.

    Raises:
        ConfigError: The precision cannot be trained in.
        MissingExtraError: A tracker is not installed.
    """
    check_dtype(model)
    require_trackers(run.report_to)


def check_dtype(model: ModelConfig) -> None:
    """Stop at a precision that cannot be trained in.

    Raises:
        ConfigError: It is float16.
    """
    if model.dtype == "float16":
        raise ConfigError("dtype = float16 loses small gradients; train in bfloat16 or float32")


def prepare_machine(run: RunConfig) -> None:
    """Set threads and allocator for the whole process."""
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    keep_large_allocations()


def held_out_rows(data: Data, run: RunConfig) -> list[TokenRow]:
    """As many held-out rows as evaluation uses."""
    return sample(data.splits.get("valid", ()), run.max_eval_rows)


def run_identity(
    base: Base,
    data: Data,
    data_config: DataConfig,
    kind: str,
    options: Mapping[str, Any],
    training: TrainingConfig,
    run: RunConfig,
) -> dict[str, Any]:
    """What decides the bytes of a result: a resumed run must agree in all of it."""
    return {
        "base weights": base.weights_hash,
        "base dtype": str(base.dtype),
        "tokenizer": base.tokenizer_hash,
        "data": data.data_hash,
        "data settings": data_config.model_dump(mode="json", exclude={"data"}),
        kind: dict(options),
        "training": training.model_dump(mode="json"),
        "max_eval_rows": run.max_eval_rows,
    }
