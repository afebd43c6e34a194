"""``lorafleet generate``: answers of a base or an adapter, or both."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.config.load import load_sections
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.use import AdapterConfig, GenerationConfig, PromptConfig
from lorafleet.errors import ConfigError
from lorafleet.generation.adapted import as_trained, load_adapted
from lorafleet.generation.decode import generate_ids
from lorafleet.generation.prompts import encode_prompts, read_prompts
from lorafleet.generation.streaming import answer_text
from lorafleet.lora import BASE_ONLY
from lorafleet.registry.use import located

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, AdapterConfig, RegistryConfig, PromptConfig, GenerationConfig)


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        prompt: The text of the prompt's last turn.
        text: The adapter's answer; the base's where there is no adapter.
        tokens: Its length in tokens, the one that ended it left out.
        complete: Whether the model ended it; false where ``max_new_tokens`` cut it.
        base_text: The base's answer, where both were asked for.
        base_complete: Whether the base ended its answer.
    """

    prompt: str
    text: str
    tokens: int
    complete: bool
    base_text: str | None = None
    base_complete: bool | None = None


@dataclass(frozen=True)
class GenerateResult:
    """Answers, and how fast they came.

    Attributes:
        model: The base.
        adapter: The adapter's folder, or none.
        answers: One for each prompt, in order.
        tokens: Generated tokens, the base's included.
        tokens_per_second: Of generation alone.
        seconds: From start to end, loading included.
    """

    model: str
    adapter: str | None
    answers: tuple[Answer, ...]
    tokens: int
    tokens_per_second: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def generate(
    config: Mapping[str, Any] | str | Path | None = None,
    /,
    *,
    on_text: Callable[[str], None] | None = None,
    **knobs: Any,
) -> GenerateResult:
    """Answer prompts with a base, or with an adapter on it.

    Args:
        config: A YAML file, or a mapping of knobs.
        on_text: Called with each piece of the answer as it is generated; for a single prompt only, several prompts are
            answered together.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are unknown or out of range, or a prompt is too long for the model.
        DataError: The prompts cannot be read or rendered.
        AdapterError: The adapter is damaged, does not fit, or was trained on another base.
        ModelError: The base cannot be loaded.
    """
    started = time.perf_counter()
    model_config, adapter_config, registry, prompt_config, settings = load_sections(SECTIONS, config, knobs)
    prompts = read_prompts(prompt_config)
    if prompt_config.base and adapter_config.adapter is None:
        raise ConfigError("base shows the base's answer beside an adapter's; name an adapter, or leave base out")
    adapted = load_adapted(model_config, located(adapter_config, registry), prompt_config.chat_template)
    base, bank = adapted.base, adapted.bank
    if not prompt_config.raw_prompt:
        prompt_config = as_trained(prompt_config, adapted.adapter, ("system_prompt",))
    ids = encode_prompts(prompts, base.tokenizer, prompt_config)
    size = prompt_config.batch_size
    loaded = time.perf_counter()
    if len(ids) == 1 and on_text is not None:
        found = generate_ids(base, bank, ids, [adapted.slot], settings, on_text)
        found += generate_ids(base, bank, ids, [BASE_ONLY], settings) if prompt_config.base else []
    else:
        # Base and adapter share their batches.
        slots = [adapted.slot] * len(ids) + ([BASE_ONLY] * len(ids) if prompt_config.base else [])
        found = generate_ids(base, bank, ids * (len(slots) // len(ids)), slots, settings, batch_size=size)
    spent = time.perf_counter() - loaded
    tokens = sum(map(len, found))
    logger.info("%d answers, %d tokens, %.1f tokens/s", len(found), tokens, tokens / spent)
    texts = [answer_text(base.tokenizer, answer) for answer in found]
    complete = [len(answer) < settings.max_new_tokens for answer in found]
    count = len(prompts)
    answers = tuple(
        Answer(
            prompt.text,
            texts[i],
            len(found[i]),
            complete[i],
            texts[count + i] if prompt_config.base else None,
            complete[count + i] if prompt_config.base else None,
        )
        for i, prompt in enumerate(prompts)
    )
    return GenerateResult(
        model=base.name,
        adapter=adapter_config.adapter,
        answers=answers,
        tokens=tokens,
        tokens_per_second=tokens / spent,
        seconds=time.perf_counter() - started,
    )
