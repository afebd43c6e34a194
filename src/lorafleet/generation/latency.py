"""How much slower a slot decodes than the bare base, with its adapter unmerged."""

import time
from statistics import median

import torch
from transformers import GenerationConfig

from lorafleet.generation.padded import route_rows
from lorafleet.lora import BASE_ONLY, LoraBank
from lorafleet.models.load import Base

PROMPT, NEW, PAIRS = 32, 8, 7


def relative_latency(base: Base, bank: LoraBank, slot: int) -> float:
    """Time to read a prompt and decode some tokens, one row at a time, as a multiple of the bare base's.

    Base and adapter take turns, so that what else the machine does meets both; the median pair counts. Dropout has to
    be off (``LoraBank.eval``).
    """
    ids = torch.arange(PROMPT, device=base.device)[None] % base.model.config.get_text_config().vocab_size
    _decode(base, bank, BASE_ONLY, ids)  # whatever is made ready at the first call
    _decode(base, bank, slot, ids)
    return median(_decode(base, bank, slot, ids) / _decode(base, bank, BASE_ONLY, ids) for _ in range(PAIRS))


def _decode(base: Base, bank: LoraBank, slot: int, ids: torch.Tensor) -> float:
    """Seconds."""
    settings = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=base.tokenizer.pad_token_id
    )
    start = time.perf_counter()
    with torch.no_grad(), route_rows(bank, [slot]):
        found = base.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        found.tolist()  # an accelerator computes behind; this waits for it
    return time.perf_counter() - start
