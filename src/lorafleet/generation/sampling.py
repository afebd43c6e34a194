"""How the next token is chosen: each row by its own penalty, filters and random numbers, whatever stands beside it."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorafleet.config.use import GenerationConfig
from lorafleet.errors import ModelError


class FiniteScores:
    """Stops a decoding whose logits are not numbers; the likeliest of them would be meaningless."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores ``(rows, vocabulary)`` as they are, or raise ``ModelError``."""
        if scores.isnan().any():
            raise ModelError(
                "the model's logits are not numbers (NaN); float16 overflows with some models: use dtype float32 or "
                "bfloat16, or look at the adapter's loss"
            )
        return scores


class RepetitionPenalty:
    """Makes tokens that occurred before less likely (Keskar et al. 2019, arXiv 1909.05858), padding left out.

    Transformers' own penalty counts the padding of a short row as an occurrence of its token, which is often the one
    that ends an answer.
    """

    def __init__(self, penalty: float, starts: Sequence[int]) -> None:
        self.penalty, self.starts = penalty, starts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Divide positive scores of tokens seen in ``input_ids[row, start:]`` by the penalty, multiply the others."""
        scores = scores.clone()
        for row, start in enumerate(self.starts):
            seen = torch.unique(input_ids[row, start:])
            values = scores[row, seen]
            scores[row, seen] = torch.where(values < 0, values * self.penalty, values / self.penalty)
        return scores


class SeededChoice:
    """Adds Gumbel noise from each row's own generator: the greatest sum is a draw from the softmax of the scores.

    So sampling needs no global random state, and a row's draw does not depend on its neighbours.
    """

    def __init__(self, keys: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(key) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores + g``, g = -log(e) with e exponentially distributed, ``(rows, vocabulary)``."""
        noise = torch.empty(scores.shape, dtype=scores.dtype, device="cpu")
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_().to(scores.device)


def processors(config: GenerationConfig, starts: Sequence[int], keys: Sequence[int]) -> LogitsProcessorList:
    """The steps from logits to the choice of the greatest score.

    Args:
        config: The knobs; temperature 0 leaves the scores without noise.
        starts: The column at which each row's prompt begins, after its padding.
        keys: The seed of each row's random numbers.
    """
    steps = LogitsProcessorList([FiniteScores()])
    if config.repetition_penalty != 1.0:
        steps.append(RepetitionPenalty(config.repetition_penalty, starts))
    if config.temperature == 0:
        return steps
    if config.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        steps.append(TopPLogitsWarper(config.top_p))
    steps.append(SeededChoice(keys))
    return steps


def sampling_keys(seed: int, prompts: Sequence[Sequence[int]], owners: Sequence[Hashable]) -> list[int]:
    """A seed for each row that follows from ``seed`` and its prompt; each copy of a prompt of one owner has its own."""
    copies: Counter[tuple[Hashable, tuple[int, ...]]] = Counter()
    keys = []
    for owner, prompt in zip(owners, map(tuple, prompts), strict=True):
        digest = hashlib.blake2b(f"{seed}:{copies[owner, prompt]}:{prompt}".encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "big") >> 1)
        copies[owner, prompt] += 1
    return keys
