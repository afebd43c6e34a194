"""Where an adapter's name leads at this moment: a revision of the registry, or a folder as it is now."""

from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lorafleet.config.data import DataConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.data.encode import ChatEncoder
from lorafleet.errors import AdapterError, ConfigError, RegistryError
from lorafleet.files.adapter import CONFIG, WEIGHTS
from lorafleet.files.manifest import MANIFEST, read_json
from lorafleet.files.method import saved_kind
from lorafleet.generation.adapted import with_template
from lorafleet.generation.stops import stop_ids
from lorafleet.models.load import Base
from lorafleet.registry.registry import Registry
from lorafleet.registry.use import names_folder

_PROFILES = 1024


@dataclass(frozen=True)
class Found:
    """An adapter that a name leads to.

    Attributes:
        label: ``name:3`` of the registry, or the folder.
        key: Changes with the adapter's bytes.
        folder: Where its files are.
    """

    label: str
    key: str
    folder: Path


@dataclass(frozen=True)
class Profile:
    """How an adapter is asked.

    Attributes:
        encoder: With its chat template and system prompt.
        stops: Tokens that end its answers.
    """

    encoder: ChatEncoder
    stops: frozenset[int]


class AdapterSource:
    """Finds adapters by name, alias or folder, and how they are asked.

    Args:
        base: The base that they are for.
        registry: Where the registry is; opened when a name asks for it.
    """

    def __init__(self, base: Base, registry: RegistryConfig) -> None:
        self.base, self.config = base, registry
        self._registry: Registry | None = None
        self.profile = lru_cache(_PROFILES)(self._profile)

    def find(self, name: str) -> Found:
        """What a name leads to now.

        Raises:
            AdapterError: It is neither a folder nor in the registry, or no LoRA adapter.
        """
        if names_folder(name):
            folder = Path(name).expanduser()
            if (kind := saved_kind(folder)) != "lora":
                raise AdapterError(f"{folder} holds {kind}; a pool takes LoRA adapters")
            return Found(str(folder), _state(folder), folder)
        try:
            if self._registry is None:
                self._registry = Registry(self.config.registry, self.config.registry_database)
            version = self._registry.find(name)
            if (kind := version.lineage["method"]) != "lora":
                raise AdapterError(f"{version.label} is {kind}; a pool takes LoRA adapters")
            return Found(version.label, version.revision, self._registry.folder(version))
        except (ConfigError, RegistryError) as error:
            what = f"there is no adapter folder at {name}, and as a name of the registry"
            raise AdapterError(f"{what}: {error}") from error

    def _profile(self, found: Found | None, system_prompt: str | None) -> Profile:
        """How an adapter, or the bare base, is asked; with another system prompt than its training's if one is given.

        Raises:
            AdapterError: Its files are damaged.
            ConfigError: Its chat template cannot be used.
        """
        base = self.base
        if found is not None:
            base = with_template(replace(base, tokenizer=copy(base.tokenizer)), None, found.folder)
            if system_prompt is None and (found.folder / MANIFEST).exists():
                trained = read_json(found.folder, MANIFEST).get("metadata", {}).get("data", {})
                system_prompt = trained.get("system_prompt")
        return Profile(ChatEncoder(base.tokenizer, DataConfig(data="", system_prompt=system_prompt)), stop_ids(base))


def _state(folder: Path) -> str:
    """A folder and when its files were written, so that an adapter that is trained anew is another one."""
    files = [path for name in (CONFIG, WEIGHTS, MANIFEST) if (path := folder / name).exists()]
    return ":".join([str(folder.resolve()), *(f"{stat.st_mtime_ns}.{stat.st_size}" for stat in map(Path.stat, files))])
