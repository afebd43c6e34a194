"""An adapter by its name in the registry, wherever a folder is taken."""

import os

from lorafleet.config.registry import RegistryConfig
from lorafleet.config.use import AdapterConfig
from lorafleet.errors import AdapterError, ConfigError, RegistryError
from lorafleet.registry.names import parse_reference
from lorafleet.registry.registry import Registry


def names_folder(text: str) -> bool:
    """Whether an adapter is meant by its folder: one that is there, or whatever looks like a path."""
    return os.path.isdir(text) or text.startswith((".", "~")) or "/" in text or "\\" in text


def located(config: AdapterConfig, registry: RegistryConfig) -> AdapterConfig:
    """The same with a folder in place of a name of the registry.

    A folder that is there, and whatever looks like a path, is taken as it is.

    Raises:
        AdapterError: It is neither a folder nor in a registry.
        RegistryError: The registry lacks it, or it is damaged there.
    """
    text = config.adapter
    if text is None or names_folder(text):
        return config
    try:
        parse_reference(text)
        opened = Registry(registry.registry, registry.registry_database)
    except (ConfigError, RegistryError) as error:
        raise AdapterError(f"there is no adapter folder at {text}, and as a name of the registry: {error}") from error
    return config.model_copy(update={"adapter": str(opened.folder(opened.find(text)))})
