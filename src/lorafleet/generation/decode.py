"""Cached decoding of a batch in which every row may belong to another adapter."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig as ModelSettings
from transformers import PreTrainedModel

from lorafleet.config.use import GenerationConfig
from lorafleet.errors import ConfigError, RoutingError, raise_all
from lorafleet.generation.sampling import processors, sampling_keys
from lorafleet.generation.stops import stop_ids
from lorafleet.generation.streaming import TextPieces
from lorafleet.lora import BASE_ONLY, Routing, Slots
from lorafleet.models.load import Base
from lorafleet.pace import Pace


def generate_ids(
    base: Base,
    bank: Slots | None,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    config: GenerationConfig,
    streamer: Callable[[str], None] | None = None,
    *,
    batch_size: int = 16,
) -> list[list[int]]:
    """Continue every prompt with its slot's adapter.

    A row's answer does not depend on the rows beside it: padding is masked, and sampling draws from a generator of the
    row's own, so torch's global random state is left alone. The model's own sampling defaults
    (``generation_config.json``) are not used.

    Args:
        base: The model and its tokenizer.
        bank: The slots; none for the bare base.
        prompts: Token ids of each prompt.
        slots: The slot of each prompt; ``BASE_ONLY`` (-1) answers with the base.
        config: How long, how varied.
        streamer: Called with each new piece of text as soon as it is certain; for one prompt only.
        batch_size: Prompts decoded together; those of similar length share a batch.

    Returns:
        The new tokens of each prompt without the one that ended it; ``max_new_tokens`` of them when none did.

    Raises:
        ConfigError: A prompt is empty, or too long for the model together with ``max_new_tokens``; lists all of them.
        RoutingError: A slot holds no adapter, or there are not as many slots as prompts.
        ModelError: The logits are not numbers.
    """
    _check(base.model, bank, prompts, slots, config, streamer)
    stops = stop_ids(base)
    keys = sampling_keys(config.seed, prompts, slots)
    answers: list[list[int]] = [[] for _ in prompts]
    pace = Pace("prompts answered", len(prompts))
    for chosen in _batches(prompts, slots, batch_size, mixed=bank is None or bank.mixes_slots):
        ids, mask = pad_left([prompts[i] for i in chosen], base.tokenizer.pad_token_id, base.device)
        with torch.no_grad(), route_rows(bank, [slots[i] for i in chosen]), _own_settings_only(base.model):
            before = virtual_tokens(bank, ids, mask)
            width = before["input_ids"].shape[1]
            output = base.model.generate(  # type: ignore[operator]
                **before,
                logits_processor=processors(
                    config, [width - len(prompts[i]) for i in chosen], [keys[i] for i in chosen]
                ),
                generation_config=_settings(base, config, stops),
                streamer=TextPieces(base.tokenizer, streamer, stops) if streamer is not None else None,
            )
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            answers[i] = _until_stop(row, stops)
        pace.add(len(chosen))
    return answers


def _batches(
    prompts: Sequence[Sequence[int]], slots: Sequence[int], batch_size: int, *, mixed: bool
) -> Iterator[list[int]]:
    """Numbers of prompts of similar length; rows of one slot side by side, so that each layer multiplies them once."""
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = [by_length] if mixed else [[i for i in by_length if slots[i] == slot] for slot in dict.fromkeys(slots)]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield sorted(group[start : start + batch_size], key=lambda i: slots[i])


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


def _check(
    model: PreTrainedModel,
    bank: Slots | None,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    config: GenerationConfig,
    streamer: Callable[[str], None] | None,
) -> None:
    if len(slots) != len(prompts):
        raise RoutingError(f"{len(prompts)} prompts need as many slots; got {len(slots)}")
    if bank is None and set(slots) - {BASE_ONLY}:
        raise RoutingError(f"slots {sorted(set(slots))} need a bank; without one only the base can answer")
    if streamer is not None and len(prompts) != 1:
        raise ConfigError(f"streaming takes one prompt; got {len(prompts)}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    faults = [f"prompt {i + 1} is empty" for i, prompt in enumerate(prompts) if not len(prompt)]
    if limit is not None:
        faults += [
            f"prompt {i + 1} has {len(prompt):,} tokens; with max_new_tokens {config.max_new_tokens:,} that exceeds "
            f"the model's {limit:,}; shorten it or lower max_new_tokens"
            for i, prompt in enumerate(prompts)
            if len(prompt) + config.max_new_tokens > limit
        ]
    raise_all(ConfigError, faults, "the prompts cannot be answered")


def _settings(base: Base, config: GenerationConfig, stops: Collection[int]) -> ModelSettings:
    return ModelSettings(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,  # the greatest score is taken; SeededChoice makes that a draw
        eos_token_id=sorted(stops),
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


def _until_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
