"""What advice goes by: the model, the rows, the machine."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lorafleet.config.data import DataConfig
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.data.load import Data, load_data
from lorafleet.data.store import TokenRows
from lorafleet.lora.layer import linear_shape
from lorafleet.lora.targets import find_targets
from lorafleet.models.load import load_meta_model, load_tokenizer
from lorafleet.models.machine import free_memory_bytes, pick_device, pick_dtype
from lorafleet.models.source import find_source


@dataclass(frozen=True)
class Facts:
    """Everything that a rule may look at.

    Attributes:
        model: The base's name.
        architecture: Its ``model_type``.
        parameters: How many it has.
        base_bytes: Of these, in the precision they would be held in.
        parameters_per_rank: Numbers of an adapter of rank 1 on the layers that it would adapt.
        hidden_size: Width of its hidden states.
        context: Longest row it takes, in tokens; none where its config does not say.
        device: Where it would train.
        free_bytes: Memory that is free there.
        task: ``label``, ``chat`` or ``text``.
        rows: Rows to train on.
        held_out: Rows to choose by.
        test: Rows to test on.
        mean_tokens: Tokens of a row.
        longest: Tokens of the longest row.
        trained_tokens: Tokens of all rows that are predicted.
        truncated: Rows that were cut at ``max_length``.
        labels: Rows of each label; empty for other tasks.
        repeated_prompts: Share of rows whose prompt other rows have too.
        warnings: What reading the rows brought up.
    """

    model: str
    architecture: str
    parameters: int
    base_bytes: int
    parameters_per_rank: int
    hidden_size: int
    context: int | None
    device: str
    free_bytes: int
    task: str
    rows: int
    held_out: int
    test: int
    mean_tokens: float
    longest: int
    trained_tokens: int
    truncated: int
    labels: dict[str, int]
    repeated_prompts: float
    warnings: tuple[str, ...]


def gather(model: ModelConfig, data: DataConfig, lora: LoraConfig) -> Facts:
    """Find them out.

    Raises:
        ConfigError: The adapter's targets do not fit the model.
        DataError: The rows cannot be read, or there are none to train on.
        ModelError: There is no such model.
    """
    device = pick_device(model.device)
    found = load_data(data, load_tokenizer(model))
    bare = load_meta_model(model)
    config = bare.config.get_text_config()  # type: ignore[union-attr, operator]
    rows = found.train
    parameters = sum(one.numel() for one in bare.parameters())
    return Facts(
        model=find_source(model).name,
        architecture=config.model_type,
        parameters=parameters,
        base_bytes=parameters * pick_dtype(model.dtype, device).itemsize,
        parameters_per_rank=sum(map(sum, map(linear_shape, find_targets(bare, lora).values()))),
        hidden_size=config.hidden_size,
        context=getattr(config, "max_position_embeddings", None),
        device=device.type,
        free_bytes=free_memory_bytes(device),
        task=found.task,
        rows=len(rows),
        held_out=_count(found, "valid"),
        test=_count(found, "test"),
        mean_tokens=float(np.mean(rows.lengths)),
        longest=int(np.max(rows.lengths)),
        trained_tokens=int(np.sum(rows.trained)),
        truncated=found.report.splits["train"].truncated,
        labels=dict(found.report.labels),
        repeated_prompts=_repeated_prompts(rows),
        warnings=tuple(found.report.warnings),
    )


def _count(data: Data, split: str) -> int:
    return len(data.splits[split]) if split in data.splits else 0


def _repeated_prompts(rows: TokenRows) -> float:
    prompts = Counter(row.input_ids[: row.prompt_length].tobytes() for row in rows if row.prompt_length)
    return sum(count for count in prompts.values() if count > 1) / len(rows)
