"""Where a base model comes from: the demo base, a GGUF file, a local folder or a hub id."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lorafleet.config.model import ModelConfig
from lorafleet.errors import ConfigError, ModelError, did_you_mean
from lorafleet.models.demo import DEMO_BASE, demo_base_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


@dataclass(frozen=True)
class Source:
    """A base's place.

    Attributes:
        name: What an adapter records as its base: the alias, the hub id, or an absolute path.
        location: A local folder or a hub id; what ``from_pretrained`` takes.
        gguf_file: The file's name inside ``location`` when the base is a GGUF file.
        revision: Branch, tag or commit on the hub.
    """

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether ``location`` is a folder on this machine."""
        return Path(self.location).is_dir()

    @property
    def path(self) -> str:
        """The folder, hub id or GGUF file, for messages."""
        return self.location if self.gguf_file is None else str(Path(self.location) / self.gguf_file)


def find_source(config: ModelConfig) -> Source:
    """Find out what ``model_name_or_path`` names, without loading it. The demo base is converted on first use.

    Raises:
        ConfigError: No model is named, or ``revision`` is given for a local one.
        ModelError: A path that does not exist, a folder without a model, or a folder that holds an adapter.
    """
    given = config.model_name_or_path
    if given is None:
        raise ConfigError(f"model_name_or_path is missing; name a hub id, a folder, a .gguf file or {DEMO_BASE}")
    path = Path(given).expanduser()
    local = path.exists() or given == DEMO_BASE
    if local and config.revision is not None:
        raise ConfigError(f"revision = {config.revision!r} is for hub models, but {given!r} is local; leave it out")
    if path.is_dir():
        _check_folder(path)
        return Source(str(path.resolve()), str(path.resolve()))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{given!r} is a file; a base is a folder with config.json, a .gguf file or a hub id")
        return Source(str(path.resolve()), str(path.resolve().parent), gguf_file=path.resolve().name)
    if given == DEMO_BASE:
        return Source(DEMO_BASE, str(demo_base_folder()))
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(given):
        near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise ModelError(f"no base model at {given!r}: the path does not exist{near}")
    if "/" not in given and (near := did_you_mean(given, [DEMO_BASE])):
        raise ModelError(f"no base model called {given!r}{near} A hub id is written organisation/{given}")
    return Source(given, given, revision=config.revision)


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter, not a base model{_base_of(folder)}; pass the folder as the adapter"
        )
    files = sorted(entry.name for entry in folder.iterdir())
    gguf = [name for name in files if name.lower().endswith(".gguf")]
    remedy = f"name the file, for example {folder / gguf[0]}" if gguf else "a base folder comes from save_pretrained"
    raise ModelError(f"{folder} has no config.json; it holds {', '.join(files[:8]) or 'nothing'}; {remedy}")


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return " (its adapter_config.json is damaged)"
    return f" (its base is {base!r})" if base else ""
