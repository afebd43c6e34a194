"""How fast a model answers: time to the first token, and tokens a second."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import GenerationConfig

from lorafleet.generation.padded import pad_left, route_rows, virtual_tokens
from lorafleet.lora import Slots
from lorafleet.models.load import Base

ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """Medians of several rounds.

    Attributes:
        first_token: Seconds from one prompt to its first token.
        single: Tokens a second of one row at a time, after its first.
        batch: Tokens a second of eight rows together, after their first.
    """

    first_token: float
    single: float
    batch: float


def measure_speed(
    base: Base, slots: Slots | None, slot: int, prompts: Sequence[Sequence[int]], new_tokens: int
) -> Speed:
    """Time greedy decoding of ``new_tokens`` tokens, whatever the model would have ended with.

    Args:
        base: The base.
        slots: The method on it, or none.
        slot: Which slot answers.
        prompts: Token ids; the first is answered by itself, the first eight together, over again where there are fewer.
        new_tokens: Of each answer, 2 at least.
    """
    eight = [prompts[i % len(prompts)] for i in range(8)]

    def seconds(rows: Sequence[Sequence[int]], count: int) -> float:
        ids, mask = pad_left(rows, base.tokenizer.pad_token_id, base.device)
        settings = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=base.tokenizer.pad_token_id
        )
        begin = time.perf_counter()
        with torch.no_grad(), route_rows(slots, [slot] * len(rows)):
            base.model.generate(  # type: ignore[operator]
                **virtual_tokens(slots, ids, mask), generation_config=settings
            ).tolist()  # an accelerator computes behind; this waits for it
        return time.perf_counter() - begin

    seconds(eight[:1], 2)  # whatever is made ready at the first call
    rounds = [[seconds(rows, count) for rows in (eight[:1], eight) for count in (1, new_tokens)] for _ in range(ROUNDS)]
    first, single, first_of_eight, batch = (median(column) for column in zip(*rounds, strict=True))
    more = new_tokens - 1
    return Speed(first, more / max(single - first, 1e-9), 8 * more / max(batch - first_of_eight, 1e-9))
