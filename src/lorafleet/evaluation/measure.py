"""How well one slot does on rows: loss, labels, generated answers."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from lorafleet.config.use import GenerationConfig
from lorafleet.data.load import Data
from lorafleet.data.store import TokenRow
from lorafleet.errors import DataError
from lorafleet.evaluation.labels import losses_and_labels
from lorafleet.evaluation.metrics import is_right, label_scores
from lorafleet.evaluation.text_metrics import text_scores
from lorafleet.evaluation.token_loss import LossModel, mean_loss, row_losses
from lorafleet.generation import answer_text, generate_ids
from lorafleet.lora import Slots
from lorafleet.models.load import Base

logger = logging.getLogger(__name__)


def measure(
    base: Base,
    loss_model: LossModel,
    slot: int,
    data: Data,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    generation: GenerationConfig | None = None,
    predictions: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Measure one slot on rows.

    Args:
        base: The model and its tokenizer.
        loss_model: The same model with its slots, if it has any.
        slot: Which slot; -1 measures the base.
        data: The task and, for label rows, the labels and their tokens.
        rows: What to measure on.
        batch_size: Rows in a batch.
        generation: Generate an answer to every row that has a prompt and compare it with its references.
        predictions: Gets one mapping for each row appended: its summed loss in nats and over how many
            tokens, what was predicted, and whether that is right.

    Returns:
        ``loss`` (nats per supervised token) and ``perplexity``; ``accuracy`` and ``macro_f1`` for label rows;
        ``exact_match`` where answers were generated, and ``bleu``, ``chrf`` and ``rouge_l`` where they are texts.

    Raises:
        DataError: There are no rows, or a row's label is not among the labels.
    """
    if not rows:
        raise DataError("there are no rows to measure on")
    found: list[dict[str, Any]] = [{} for _ in rows]
    if data.task == "label":
        losses, metrics = _label_metrics(base, loss_model, slot, data, rows, batch_size, found)
    else:
        losses, metrics = row_losses(loss_model, rows, slot, batch_size), {}
    for entry, (loss, count) in zip(found, losses, strict=True):
        entry |= {"loss_sum": loss, "loss_tokens": count}
    metrics = loss_metrics(mean_loss(losses)) | metrics
    if generation is not None:
        metrics |= _answer_metrics(base, loss_model.bank, slot, data, rows, batch_size, generation, found)
    if predictions is not None:
        predictions += found
    return metrics


def loss_metrics(loss: float) -> dict[str, float]:
    """A mean loss in nats, and its perplexity ``exp(loss)``."""
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp(710) overflows


def prompt_of(row: TokenRow) -> list[int]:
    """The tokens of a row before its last answer."""
    return [int(token) for token in row.input_ids[: row.prompt_length]]


def short_answer(row: TokenRow) -> str | None:
    """The row's own field ``answer``; none where the row has references alone."""
    return None if row.answer == "\n".join(row.references) and row.references else row.answer


def references_of(row: TokenRow) -> list[str]:
    """What a generated answer may be: the row's short answer where it has one, else any of its references."""
    answer = short_answer(row)
    return [answer] if answer is not None else list(dict.fromkeys([row.reference, *row.references]))


def _label_metrics(
    base: Base,
    loss_model: LossModel,
    slot: int,
    data: Data,
    rows: Sequence[TokenRow],
    batch_size: int,
    found: list[dict[str, Any]],
) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """The rows' losses, and how well their labels are found."""
    unknown = [row.source for row in rows if row.reference not in data.labels]
    if unknown:
        raise DataError(f"{len(unknown)} rows have a label that is none of the task's, the first is {unknown[0]}")
    prompts = [prompt_of(row) for row in rows]
    losses, choices = losses_and_labels(base, loss_model, slot, rows, prompts, data.label_ids, batch_size=batch_size)
    predicted = [data.labels[choice.label] for choice in choices]
    for entry, row, label, choice in zip(found, rows, predicted, choices, strict=True):
        entry |= {"label": label, "label_log_prob": choice.log_prob, "label_right": label == row.reference}
    return losses, label_scores([row.reference for row in rows], predicted)


def _answer_metrics(
    base: Base,
    bank: Slots | None,
    slot: int,
    data: Data,
    rows: Sequence[TokenRow],
    batch_size: int,
    generation: GenerationConfig,
    found: list[dict[str, Any]],
) -> dict[str, float]:
    """How generated answers agree with their references; rows without a prompt have none and do not count.

    Texts are compared with texts: a row with a short answer, a number for example, or with a label counts for exact
    match alone.
    """
    asked = [i for i, row in enumerate(rows) if row.prompt_length]
    if not asked:
        raise DataError("answers need rows with a prompt; these are plain text")
    prompts = [prompt_of(rows[i]) for i in asked]
    answers = generate_ids(base, bank, prompts, [slot] * len(asked), generation, batch_size=batch_size)
    right = 0
    for i, answer in zip(asked, answers, strict=True):
        text = answer_text(base.tokenizer, answer)
        agrees = is_right(text, references_of(rows[i]))
        right += agrees
        found[i] |= {"text": text, "text_right": agrees, "text_complete": len(answer) < generation.max_new_tokens}
    texts = [i for i in asked if data.task != "label" and short_answer(rows[i]) is None]
    scores = text_scores([found[i]["text"] for i in texts], [references_of(rows[i]) for i in texts]) if texts else {}
    return {"exact_match": right / len(asked), **scores}
