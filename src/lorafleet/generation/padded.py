"""Decoding of left-padded batches, by transformers: for what flat batches do not fit."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig as ModelSettings
from transformers import PreTrainedModel

from lorafleet.generation.request import Request
from lorafleet.generation.sampling import processors
from lorafleet.generation.streaming import TextPieces
from lorafleet.lora import Routing, Slots
from lorafleet.models.load import Base
from lorafleet.pace import Pace


def generate_padded(base: Base, bank: Slots | None, requests: Sequence[Request], batch_size: int, pace: Pace) -> None:
    """Answer requests in left-padded batches by transformers' own ``generate``.

    The way of models that flat batches do not fit, and of methods that put virtual tokens before rows. A row's answer
    does not depend on the rows beside it: padding is masked, and sampling draws from a generator of the row's own. The
    model's own sampling defaults (``generation_config.json``) are not used.

    Args:
        base: The model and its tokenizer.
        bank: The slots; none for the bare base.
        requests: All with the same settings and stops; those of similar length share a batch.
        batch_size: Of them.
        pace: Told of each batch.
    """
    for chosen in _batches(requests, batch_size, mixed=bank is None or bank.mixes_slots):
        ids, mask = pad_left([r.prompt for r in chosen], base.tokenizer.pad_token_id, base.device)
        first = chosen[0]
        with torch.no_grad(), route_rows(bank, [r.slot for r in chosen]), _own_settings_only(base.model):
            before = virtual_tokens(bank, ids, mask)
            width = before["input_ids"].shape[1]
            starts = [width - len(r.prompt) for r in chosen]
            output = base.model.generate(  # type: ignore[operator]
                **before,
                logits_processor=processors(first.config, starts, [r.key for r in chosen]),
                generation_config=_settings(base, first),
                streamer=_Streamer(first.pieces, first.stops) if first.pieces is not None else None,
            )
        for request, row in zip(chosen, output[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in request.stops), len(row))
            request.answer, request.complete, request.done = row[:end], end < len(row), True
        pace.add(len(chosen))


class _Streamer:
    """Hands the tokens that ``generate`` finds on to a request's pieces of text; its first are the prompt's."""

    def __init__(self, pieces: TextPieces, stops: Collection[int]) -> None:
        self.pieces, self.stops, self.prompt_seen = pieces, stops, False

    def put(self, value: Tensor) -> None:
        """Take the prompt ``(1, time)`` first, then one token ``(1,)`` a step."""
        if self.prompt_seen:
            self.pieces.add([token for token in value.tolist() if token not in self.stops])
        self.prompt_seen = True

    def end(self) -> None:
        """Take the end."""
        self.pieces.end()


def _batches(requests: Sequence[Request], batch_size: int, *, mixed: bool) -> Iterator[list[Request]]:
    """Requests of similar length; rows of one slot side by side, so that each layer multiplies them once."""
    by_length = sorted(requests, key=lambda r: -len(r.prompt))
    slots = dict.fromkeys(r.slot for r in requests)
    for group in [by_length] if mixed else [[r for r in by_length if r.slot == slot] for slot in slots]:
        for start in range(0, len(group), batch_size):
            yield sorted(group[start : start + batch_size], key=lambda r: r.slot)


def virtual_tokens(bank: Slots | None, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What ``generate`` of transformers takes for left-padded rows, by the routing in force.

    Virtual tokens come as keys and values that are there already; ids that nobody looks at stand in their places.
    """
    cache = bank.virtual_cache(len(ids)) if bank is not None else None
    if cache is None:
        return {"input_ids": ids, "attention_mask": mask}
    shape = (len(ids), cache.get_seq_length())
    before = {"input_ids": torch.cat([ids.new_zeros(shape), ids], dim=1)}
    return before | {"attention_mask": torch.cat([mask.new_ones(shape), mask], dim=1), "past_key_values": cache}


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-align rows of token ids: ids ``(rows, time)`` and a mask of the same shape, 0 at padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def route_rows(bank: Slots | None, slots: Sequence[int]) -> AbstractContextManager[None]:
    """Send each row of a ``(rows, time)`` batch to its slot, in every forward within the ``with`` block."""
    if bank is None:
        return nullcontext()
    runs = [(slot, len(list(rows))) for slot, rows in groupby(slots)]
    return bank.route(Routing(tuple(s for s, _ in runs), tuple(n for _, n in runs), unit="rows"))


def _settings(base: Base, request: Request) -> ModelSettings:
    return ModelSettings(
        max_new_tokens=request.config.max_new_tokens,
        do_sample=False,  # the greatest score is taken; SeededChoice makes that a draw
        eos_token_id=sorted(request.stops),
        pad_token_id=base.tokenizer.pad_token_id,
        bos_token_id=base.tokenizer.bos_token_id,
    )


@contextmanager
def _own_settings_only(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's ``generation_config``, from which transformers would take whatever we leave unset."""
    before = model.generation_config
    model.generation_config = ModelSettings()
    try:
        yield
    finally:
        model.generation_config = before
