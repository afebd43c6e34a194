"""Put a bank into a model."""

from collections.abc import Sequence

from torch import nn

from lorafleet.config.lora import LoraConfig
from lorafleet.lora.bank import LoraBank
from lorafleet.lora.targets import find_targets


def inject_lora(
    model: nn.Module, config: LoraConfig | Sequence[LoraConfig], *, num_slots: int | None = None, seed: int = 0
) -> LoraBank:
    """Put LoRA layers into ``model`` and fill one slot for each config.

    Args:
        model: Changed in place: its targets become :class:`LoraLinear`, its own weights stop requiring gradients.
        config: One adapter's knobs, or one for each slot.
        num_slots: Slots to make; as many as configs when not given.
        seed: Seed of the first adapter; the next ones count up.

    Returns:
        The bank that routes tokens to slots.

    Raises:
        AdapterError: The model carries a bank already.
        ConfigError: Targets do not fit the model.
    """
    configs = [config] if isinstance(config, LoraConfig) else list(config)
    find_targets(model, configs[0])
    bank = LoraBank(model, num_slots or len(configs))
    for number, one in enumerate(configs):
        bank.add(one, seed=seed + number)
    return bank
