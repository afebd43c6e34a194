"""Answers to prompts of which every one may belong to another adapter."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from lorafleet.config.use import GenerationConfig
from lorafleet.errors import ConfigError, RoutingError, raise_all
from lorafleet.generation.decoder import Decoder
from lorafleet.generation.padded import generate_padded
from lorafleet.generation.request import Request
from lorafleet.generation.sampling import sampling_keys
from lorafleet.generation.stops import stop_ids
from lorafleet.generation.streaming import TextPieces
from lorafleet.lora import BASE_ONLY, Slots
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

    A row's answer does not depend on the rows beside it, and sampling draws from a generator of the row's own, so
    torch's global random state is left alone. The model's own sampling defaults (``generation_config.json``) are not
    used.

    Args:
        base: The model and its tokenizer.
        bank: The slots; none for the bare base.
        prompts: Token ids of each prompt.
        slots: The slot of each prompt; ``BASE_ONLY`` (-1) answers with the base.
        config: How long, how varied.
        streamer: Called with each new piece of text as soon as it is certain; for one prompt only.
        batch_size: Prompts decoded together.

    Returns:
        The new tokens of each prompt without the one that ended it; ``max_new_tokens`` of them when none did.

    Raises:
        ConfigError: A prompt is empty, or too long for the model together with ``max_new_tokens``; lists all of them.
        RoutingError: A slot holds no adapter, or there are not as many slots as prompts.
        ModelError: The logits are not numbers.
    """
    _check(base.model, bank, prompts, slots, config, streamer)
    stops = stop_ids(base)
    pieces = TextPieces(base.tokenizer, streamer) if streamer is not None else None
    requests = [
        Request(prompt, slot, config, key, stops, pieces)
        for prompt, slot, key in zip(prompts, slots, sampling_keys(config.seed, prompts, slots), strict=True)
    ]
    pace = Pace("prompts answered", len(requests))
    if Decoder.fits(base, bank):
        _decode(base, bank, requests, batch_size, pace)
    else:
        generate_padded(base, bank, requests, batch_size, pace)
    return [request.answer for request in requests]


def _decode(base: Base, bank: Slots | None, requests: Sequence[Request], batch_size: int, pace: Pace) -> None:
    """Long prompts first, so that the cache grows once; slots that cannot share a batch one after another."""
    mixed = bank is None or bank.mixes_slots
    for slot in [None] if mixed else dict.fromkeys(r.slot for r in requests):
        decoder = Decoder(base, bank, min(batch_size, len(requests)))
        for request in sorted(requests, key=lambda r: -len(r.prompt)):
            if slot in (None, request.slot):
                decoder.submit(request)
        while decoder.busy:
            for request in decoder.step():
                if request.error is not None:
                    raise request.error
                pace.add(1)


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
    raise_all(ConfigError, prompt_faults(model, prompts, config), "the prompts cannot be answered")


def prompt_faults(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[str]:
    """Every prompt that is empty, or too long for the model together with its answer."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    faults = [f"prompt {i + 1} is empty" for i, prompt in enumerate(prompts) if not len(prompt)]
    if limit is not None:
        faults += [
            f"prompt {i + 1} has {len(prompt):,} tokens; with max_new_tokens {config.max_new_tokens:,} that exceeds "
            f"the model's {limit:,}; shorten it or lower max_new_tokens"
            for i, prompt in enumerate(prompts)
            if len(prompt) + config.max_new_tokens > limit
        ]
    return faults
