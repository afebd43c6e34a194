"""The rows of a benchmark: tokenized once by lorafleet, the same ids and labels for every peer."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.job import IGNORED
from lorafleet.config.data import DataConfig
from lorafleet.data.load import load_data
from lorafleet.data.store import TokenRow
from lorafleet.errors import DataError

Row = dict[str, list[int]]


def tokenized_rows(data: str, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Token ids and labels of a file's rows, with the loss on the answers.

    Args:
        data: Rows of any shape that ``lorafleet train`` takes, or a folder whose ``train`` file is used.
        tokenizer: The base's.

    Raises:
        DataError: There is nothing, or its rows cannot be used.
    """
    splits = load_data(DataConfig(data=data, valid_fraction=0), tokenizer).splits
    return [labelled(row) for row in splits["train"]]


def labelled(row: TokenRow) -> Row:
    """A row as the peers take it."""
    ids = np.asarray(row.input_ids)
    return {"input_ids": ids.tolist(), "labels": np.where(row.loss_mask, ids, IGNORED).tolist()}


def shuffled(rows: list[Row], count: int, seed: int) -> list[Row]:
    """``count`` rows in random order: the fixed order of the parity phase.

    Raises:
        DataError: There are fewer rows.
    """
    _need(rows, count)
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in order]


def length_grouped(rows: list[Row], batch_size: int, batches: int, seed: int) -> list[Row]:
    """The rows of a fair sample of the length-grouped batches of one epoch, batch after batch.

    transformers' ``group_by_length`` sorts 50 batches at a time, longest first, so the first steps of an epoch are all
    long and say little about the rest. The whole epoch is laid out by transformers' own function, its batches are
    sorted by length, and every n-th is taken from a random start; then their order is shuffled.

    Raises:
        DataError: There are too few rows.
    """
    _need(rows, batch_size * batches)
    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices([len(row["input_ids"]) for row in rows], batch_size, generator=generator)
    epoch = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    epoch.sort(key=lambda batch: max(len(rows[i]["input_ids"]) for i in batch))
    random = np.random.default_rng(seed)
    places = ((np.arange(batches) + random.random()) * len(epoch) / batches).astype(int)
    return [rows[i] for place in random.permutation(places) for i in epoch[place]]


def _need(rows: list[Row], count: int) -> None:
    if len(rows) < count:
        raise DataError(
            f"the benchmark needs {count} rows, --data has {len(rows)}; ask for fewer steps or name more rows"
        )
