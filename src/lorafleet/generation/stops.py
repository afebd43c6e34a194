"""Which tokens end an answer."""

import logging
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from lorafleet.data.encode import ChatEncoder
from lorafleet.errors import ConfigError, ModelError
from lorafleet.models.load import Base

logger = logging.getLogger(__name__)


def stop_ids(base: Base) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's and the model's end of text, the template's end of turn."""
    found: set[int] = set()
    for given in (
        base.tokenizer.eos_token_id,
        base.model.config.get_text_config().eos_token_id,
        getattr(base.model.generation_config, "eos_token_id", None),
        template_stops(base.tokenizer),
    ):
        found |= set(given) if isinstance(given, Iterable) else {given} if given is not None else set()
    return frozenset(found)


def template_stops(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Where answers end by the chat template; nothing where the template cannot render a question and an answer."""
    try:
        return ChatEncoder(tokenizer).stop_ids
    except (ConfigError, ModelError) as error:
        logger.info("no end of turn is known, only the end of text stops an answer: %s", error)
        return ()
