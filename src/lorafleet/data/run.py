"""Look at data as training would use it, without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.model import ModelConfig
from lorafleet.data.load import load_data
from lorafleet.data.report import DataReport
from lorafleet.models.load import load_tokenizer


def inspect_data(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> DataReport:
    """Read, check and tokenize rows as ``train`` would, and report what it would train.

    Args:
        config: A YAML file or a mapping with the knobs of the model and of the data.
        knobs: Knobs that override it; ``data`` and ``model`` are needed.

    Returns:
        Counts by split, rejections with place and reason, and one decoded example with its trained span marked.

    Raises:
        ConfigError: A knob is wrong or missing.
        DataError: The rows cannot be used (see ``load_data``).
    """
    model, data = load_sections((ModelConfig, DataConfig), config, knobs)
    return load_data(data, load_tokenizer(model)).report
