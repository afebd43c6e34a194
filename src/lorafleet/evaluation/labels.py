"""Which label a model finds likeliest, by the log-probability of the label's whole text."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from lorafleet.data.batches import TrainRow
from lorafleet.errors import DataError, ModelError
from lorafleet.evaluation.label_search import LabelSearch, LabelTrie, build_trie
from lorafleet.evaluation.token_loss import LossModel, family_losses, row_losses
from lorafleet.generation.padded import route_rows
from lorafleet.lora import Slots
from lorafleet.lora.slots import answering
from lorafleet.models.load import Base
from lorafleet.pace import Pace

logger = logging.getLogger(__name__)

WIDTH = 16
"""Nodes of one row that are opened in one forward pass."""

FEW = 1024
"""Labels times tokens of the longest prompt, up to which all labels of a row are computed with its own loss.

Attention sees the prompt again for each of them.
"""


@dataclass(frozen=True)
class LabelChoice:
    """The likeliest label of a row: its number, and the log-probability of its tokens in nats."""

    label: int
    log_prob: float


@dataclass(frozen=True)
class _Answered:
    """A prompt with a label behind it, whose tokens are the targets."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


def losses_and_labels(
    base: Base,
    loss_model: LossModel,
    slot: int,
    rows: Sequence[TrainRow],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> tuple[list[tuple[float, int]], list[LabelChoice]]:
    """Each row's own loss as ``row_losses`` gives it, and its prompt's likeliest label.

    A few labels of short prompts ride along in the flat batch of the rows' own losses, which computes a prompt once for
    all of them. Others are searched for.

    Args:
        base: The model.
        loss_model: The same model with its slots.
        slot: Which slot answers; -1 for the base.
        rows: Whose loss is wanted.
        prompts: Of each row, token ids up to where the answer begins.
        labels: As ``choose_labels`` takes them.
        batch_size: Rows in a batch, each with its labels.

    Raises:
        DataError: A label or prompt is empty, or two labels have the same tokens.
        ModelError: The logits are not numbers.
    """
    if not loss_model.flat or len(labels) * max(map(len, prompts), default=0) > FEW:
        choices = choose_labels(base, loss_model, slot, prompts, labels, batch_size=batch_size)
        return row_losses(loss_model, rows, slot, batch_size), choices
    build_trie(labels)
    _check_prompts(prompts)
    families = [[row, *_answered(prompt, labels)] for row, prompt in zip(rows, prompts, strict=True)]
    found = family_losses(loss_model, families, slot, batch_size)
    scores = -np.array([[loss for loss, _ in family[1:]] for family in found])
    _check_numbers(scores)
    return [family[0] for family in found], _best(scores)


def choose_labels(
    base: Base,
    loss_model: LossModel,
    slot: int,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> list[LabelChoice]:
    """Find each prompt's likeliest label: ``argmax Σ log p(token | prompt, tokens before)``.

    Exactly what scoring every label gives, for a fraction of the work: what all prompts begin with is computed once, a
    prompt's keys and values serve all its labels, and labels whose beginning is already less likely than another whole
    label are left out. Models that cannot attend along a tree are scored label by label.

    Args:
        base: The model.
        loss_model: The same model with its slots.
        slot: Which slot answers; -1 for the base.
        prompts: Token ids up to where the answer begins.
        labels: Token ids of each label with the token that ends the answer.
        batch_size: Prompts in a batch.

    Raises:
        DataError: A label or prompt is empty, or two labels have the same tokens.
        ModelError: The logits are not numbers.
    """
    trie = build_trie(labels)
    _check_prompts(prompts)
    if not prompts:
        return []
    # Longest first: the check on the first row then covers what only shows on long rows, such as sliding windows.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    choices: dict[int, LabelChoice] = {}
    pace = Pace("rows labelled", len(prompts))
    with torch.no_grad():
        scorer = _checked_scorer(base, loss_model, slot, prompts, trie, labels, prompts[order[0]])
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            if scorer is not None:
                found = scorer(batch)
            else:
                found = _best(label_log_probs(loss_model, slot, batch, labels, batch_size=batch_size))
            choices.update(zip(chosen, found, strict=True))
            pace.add(len(chosen))
    return [choices[i] for i in range(len(prompts))]


def label_log_probs(
    loss_model: LossModel,
    slot: int,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> NDArray[np.float64]:
    """Log-probability of every label after every prompt ``(prompts, labels)``, one whole sequence for each pair."""
    _check_prompts(prompts)
    pairs = [pair for prompt in prompts for pair in _answered(prompt, labels)]
    losses = [loss for loss, _ in row_losses(loss_model, pairs, slot, batch_size)]
    scores = -np.array(losses).reshape(len(prompts), len(labels))
    _check_numbers(scores)
    return scores


def _answered(prompt: Sequence[int], labels: Sequence[Sequence[int]]) -> list[_Answered]:
    rows = [np.array([*prompt, *label], dtype=np.int32) for label in labels]
    return [_Answered(row, np.arange(len(row)) >= len(prompt)) for row in rows]


class TreeScorer:
    """Scores labels as a tree behind each prompt, in one growing cache.

    The columns of the cache are: the prefix that all prompts share, each prompt's rest (padded on the left), then one
    column for each opened node. A node sees its prompt, its ancestors and itself, by a mask of our own.
    """

    def __init__(self, base: Base, bank: Slots | None, slot: int, prompts: Sequence[Sequence[int]], trie: LabelTrie):
        self.base, self.bank, self.slot, self.trie = base, bank, slot, trie
        parameters = signature(base.model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5
        self._keeps_logits = "logits_to_keep" in parameters
        self._vocabulary = torch.tensor(trie.vocabulary, device=base.device)
        # Every prompt keeps a token of its own, whose logits begin the answer.
        shortest = min(map(len, prompts)) - 1
        self.prefix: list[int] = common_start([p[:shortest] for p in prompts])
        self._prefix_cache = DynamicCache()
        if self.prefix:
            count = len(self.prefix)
            seen = torch.ones((1, count, count), dtype=torch.bool).tril()
            self._forward([self.prefix], [list(range(count))], seen, self._prefix_cache, keep=1)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[LabelChoice]:
        """The likeliest label of each prompt."""
        shared, rows = len(self.prefix), len(prompts)
        width = max(map(len, prompts)) - shared
        padding = [shared + width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt[shared:]) for pad, prompt in zip(padding, prompts, strict=True)]
        positions = [[shared] * pad + list(range(shared, len(p))) for pad, p in zip(padding, prompts, strict=True)]
        cache = self._start_cache(rows)
        # seen[row, query, column]
        column = torch.arange(width)
        own = column >= torch.tensor(padding)[:, None]
        causal = (column[:, None] >= column) & own[:, None] | torch.eye(width, dtype=torch.bool)
        seen = torch.cat([causal.new_ones((rows, width, shared)), causal], dim=2)
        first = self._forward(ids, positions, seen, cache, keep=1)[:, 0]
        searches = [LabelSearch(self.trie, log_probs) for log_probs in first]
        prompt_columns = torch.cat([own.new_ones((rows, shared)), own], dim=1)
        self._search(searches, [len(p) for p in prompts], prompt_columns, cache)
        return [LabelChoice(search.label, float(search.log_prob)) for search in searches]

    def _search(
        self, searches: list[LabelSearch], lengths: list[int], prompt_columns: Tensor, cache: DynamicCache
    ) -> None:
        """Open nodes of all rows, a few at a time, until every search is done; finished rows leave the cache."""
        rows = list(range(len(searches)))
        columns: list[dict[int, int]] = [{} for _ in searches]  # of each row: node -> column of the cache
        filled = prompt_columns.shape[1]
        while active := [i for i in rows if not searches[i].done]:
            if len(active) <= 0.75 * len(rows):
                keep = torch.tensor([rows.index(i) for i in active])
                cache.batch_select_indices(keep.to(self.base.device))
                prompt_columns, rows = prompt_columns[keep], active
            opened = [searches[i].next_nodes(WIDTH) for i in rows]
            width = max(map(len, opened))
            seen = self._tree_mask(opened, [columns[i] for i in rows], prompt_columns, filled, width)
            spare = [[0] * (width - len(nodes)) for nodes in opened]
            ids = [[self.trie.tokens[n] for n in nodes] + pad for nodes, pad in zip(opened, spare, strict=True)]
            positions = [
                [lengths[i] + self.trie.depths[n] - 1 for n in nodes] + pad
                for i, nodes, pad in zip(rows, opened, spare, strict=True)
            ]
            log_probs = self._forward(ids, positions, seen, cache, keep=width)
            for i, nodes, found in zip(rows, opened, log_probs, strict=True):
                for query, node in enumerate(nodes):
                    searches[i].take(node, found[query])
            filled += width

    def _tree_mask(
        self, opened: list[list[int]], columns: list[dict[int, int]], prompt_columns: Tensor, filled: int, width: int
    ) -> Tensor:
        """What each new node sees ``(rows, width, filled + width)``; notes the nodes' columns in ``columns``."""
        seen = torch.zeros((len(opened), width, filled + width), dtype=torch.bool)
        seen[:, :, : prompt_columns.shape[1]] = prompt_columns[:, None]
        seen[:, range(width), range(filled, filled + width)] = True  # itself, spare columns too
        for row, (nodes, own) in enumerate(zip(opened, columns, strict=True)):
            own.update((node, filled + query) for query, node in enumerate(nodes))
            for query, node in enumerate(nodes):
                seen[row, query, [own[ancestor] for ancestor in self.trie.path(node)]] = True
        return seen

    def _start_cache(self, rows: int) -> DynamicCache:
        """A cache for ``rows`` prompts that holds the shared prefix."""
        cache = DynamicCache()
        if self.prefix:
            for number, (keys, values, *_) in enumerate(self._prefix_cache):
                cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache

    def _forward(
        self, ids: list[list[int]], positions: list[list[int]], seen: Tensor, cache: DynamicCache, *, keep: int
    ) -> NDArray[np.float64]:
        """Extend the cache; log-probabilities ``(rows, keep, vocabulary of the trie)`` of the last ``keep`` columns."""
        device, dtype = self.base.device, self.base.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).to(device)
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=device),
            "position_ids": torch.tensor(positions, device=device),
            "attention_mask": mask[:, None],
            self._cache_name: cache,
            "use_cache": True,
        }
        if self._keeps_logits:
            arguments["logits_to_keep"] = keep
        with route_rows(self.bank, [self.slot] * len(ids)):
            logits = _wide(self.base.model(**arguments).logits[:, -keep:])
        log_probs: NDArray[np.float64] = (
            (logits[..., self._vocabulary] - logits.logsumexp(-1, keepdim=True)).double().cpu().numpy()
        )
        _check_numbers(log_probs)
        return log_probs


def _checked_scorer(
    base: Base,
    loss_model: LossModel,
    slot: int,
    prompts: Sequence[Sequence[int]],
    trie: LabelTrie,
    labels: Sequence[Sequence[int]],
    prompt: Sequence[int],
) -> TreeScorer | None:
    """A scorer, if it agrees with a whole sequence on ``prompt``; none if the model cannot be scored along a tree."""
    if answering(base.model, loss_model.bank) is not base.model:
        return None  # virtual tokens stand before each row
    try:
        scorer = TreeScorer(base, loss_model.bank, slot, prompts, trie)
        found = scorer([prompt])[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        logger.info("%s is scored label by label (%s: %s)", type(base.model).__name__, type(error).__name__, error)
        return None
    wanted = label_log_probs(loss_model, slot, [prompt], [labels[found.label]], batch_size=1)[0, 0]
    tolerance = 1e-3 if base.dtype in (torch.float32, torch.float64) else 5e-2
    if abs(found.log_prob - wanted) <= tolerance * max(1.0, abs(wanted)):
        return scorer
    logger.info(
        "%s is scored label by label: its tree gives %.5f where the sequence gives %.5f",
        type(base.model).__name__,
        found.log_prob,
        wanted,
    )
    return None


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    first = list(rows[0])
    same = min(next((i for i, (a, b) in enumerate(zip(first, row, strict=False)) if a != b), len(row)) for row in rows)
    return first[:same]


def _best(scores: NDArray[np.float64]) -> list[LabelChoice]:
    return [LabelChoice(int(row.argmax()), float(row.max())) for row in scores]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise DataError(f"{len(empty)} prompts are empty, the first is number {empty[0]}; a label needs a prompt")


def _check_numbers(scores: NDArray[np.float64]) -> None:
    if np.isnan(scores).any():
        raise ModelError("the model's logits are not numbers (NaN); use dtype float32 or look at the adapter's loss")
