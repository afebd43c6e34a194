"""A base with, or without, one adapter: found, checked against each other, loaded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorafleet.config.knob import Section
from lorafleet.config.model import ModelConfig
from lorafleet.config.use import AdapterConfig
from lorafleet.errors import AdapterError, ConfigError, ModelError, raise_all
from lorafleet.files.adapter import Adapter
from lorafleet.files.method import SavedMethod, load_saved
from lorafleet.files.run_folder import TEMPLATE
from lorafleet.lora import BASE_ONLY, Slots
from lorafleet.methods.saved import restore
from lorafleet.models.load import Base, load_base

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Adapted:
    """A base and at most one adapter on it.

    Attributes:
        base: The base; its tokenizer has the chat template that the adapter was trained with.
        bank: The adapter, in slot 0; none for the bare base.
        adapter: What was read from the adapter's folder.
    """

    base: Base
    bank: Slots | None = None
    adapter: Adapter | SavedMethod | None = None

    @property
    def slot(self) -> int:
        """The adapter's slot, or ``BASE_ONLY``."""
        return BASE_ONLY if self.bank is None else 0


def load_adapted(model: ModelConfig, config: AdapterConfig, chat_template: str | None = None) -> Adapted:
    """Load a base, and the adapter on it if one is named.

    Args:
        model: Which base; where it names none, the base that the adapter was trained on.
        config: Which adapter, and whether it must have been trained on this very base.
        chat_template: A Jinja file to use in place of the adapter's or the model's own template.

    Raises:
        ConfigError: Neither model nor adapter is named, or the template cannot be read.
        AdapterError: The adapter is damaged, does not fit, or was trained on another base or tokenizer.
        ModelError: The base cannot be loaded.
    """
    if config.adapter is None:
        base = load_base(model)
        return Adapted(with_template(base, chat_template, None))
    folder = Path(config.adapter)
    adapter = load_saved(folder)
    base = _load_its_base(base_of(model, adapter, folder), named=model.model_name_or_path is not None, folder=folder)
    if config.check_base:
        raise_all(AdapterError, mismatches(adapter, base), f"the adapter in {folder} was not trained on this base")
    return Adapted(with_template(base, chat_template, folder), restore(base.model, adapter), adapter)


def base_of(model: ModelConfig, adapter: Adapter | SavedMethod, folder: Path) -> ModelConfig:
    """The base to load: the one that is named, else the one that the adapter names.

    Raises:
        ConfigError: Neither names one.
    """
    if model.model_name_or_path is not None:
        return model
    if adapter.base_name is None:
        raise ConfigError(f"the adapter in {folder} does not say which base it was trained on; name it with model")
    found = {"model_name_or_path": adapter.base_name, "revision": model.revision or adapter.base_revision}
    return model.model_copy(update=found)


def mismatches(adapter: Adapter | SavedMethod, base: Base) -> list[str]:
    """What an adapter's metadata says about its base that this base is not; nothing for an adapter without metadata."""
    remedy = "name the right model, or use the adapter anyway with check_base false"
    faults = []
    for key, what, now in (
        ("base_weights_hash", "weights", base.weights_hash),
        ("tokenizer_hash", "tokenizer or chat template", base.tokenizer_hash),
    ):
        then = adapter.metadata.get(key)
        if then is not None and then != now:
            faults.append(
                f"the {what} of {base.name} (hash {now[:12]}…) are not those of {adapter.base_name} "
                f"that it was trained on (hash {str(then)[:12]}…); {remedy}"
            )
    return faults


def as_trained(section: S, adapter: Adapter | SavedMethod | None, keys: Sequence[str]) -> S:
    """Take knobs that nobody gave from the adapter's training, so that it is asked as it was trained."""
    trained = adapter.metadata.get("data", {}) if adapter is not None else {}
    taken = {key: trained[key] for key in keys if key in trained and key not in section.model_fields_set}
    changed = {key: value for key, value in taken.items() if value != getattr(section, key)}
    if changed:
        logger.info(
            "as in the adapter's training: %s", ", ".join(f"{key} = {value!r}" for key, value in changed.items())
        )
    return section.model_copy(update=changed)


def _load_its_base(model: ModelConfig, *, named: bool, folder: Path) -> Base:
    try:
        return load_base(model)
    except ModelError as error:
        if named:
            raise
        raise ModelError(
            f"{error}\nThe adapter in {folder} names this base; if it lies elsewhere, give model"
        ) from error


def with_template(base: Base, chat_template: str | None, folder: Path | None) -> Base:
    """Give the tokenizer the template of the file that is named, else the one that travels with the adapter."""
    path = None
    if chat_template is not None:
        path = Path(chat_template).expanduser()
    elif folder is not None and (folder / TEMPLATE).is_file():
        path = folder / TEMPLATE
        if not path.resolve().is_relative_to(folder.resolve()):
            raise AdapterError(f"{path} is a link out of its folder; copy the file itself")
    if path is not None:
        try:
            base.tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {path} cannot be read: {error}") from error
    return base
