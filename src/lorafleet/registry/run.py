"""``lorafleet adapters``: the registry's verbs, with their knobs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.config.load import load_sections
from lorafleet.config.registry import (
    AddConfig,
    AliasConfig,
    ExportConfig,
    GcConfig,
    ImportConfig,
    ListConfig,
    PromoteConfig,
    RegistryConfig,
)
from lorafleet.errors import ConfigError
from lorafleet.registry import archive, upkeep
from lorafleet.registry.difference import Difference, differences
from lorafleet.registry.names import name_fault
from lorafleet.registry.registry import Registry
from lorafleet.registry.version import Move, Version


@dataclass(frozen=True)
class Versions:
    """What the registry has.

    Attributes:
        versions: Versions by name and number, each with the fields of ``adapters show``.
    """

    versions: tuple[Version, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class Shown:
    """A version, and how the aliases of its name have moved.

    Attributes:
        version: Its name, number, revision, verdict, scores, tags, aliases, size, files and lineage.
        folder: Where its files are, to be read by other programs.
        history: Promotions and rollbacks of its name, oldest first.
    """

    version: Version
    folder: str
    history: tuple[Move, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def add(folder: str, /, **knobs: Any) -> Version:
    """Keep an adapter's folder under a name."""
    where, what = load_sections((RegistryConfig, AddConfig), None, knobs)
    registry = _open(where, create=True)
    return registry.add(folder, what.name, tags=what.tags, parent=what.parent, rejected=what.rejected)


def list_versions(name: str | None = None, /, **knobs: Any) -> Versions:
    """All versions, or those of a name."""
    where, what = load_sections((RegistryConfig, ListConfig), None, knobs)
    registry = _open(where)
    if name is not None:
        if fault := name_fault(name):
            raise ConfigError(f"{fault}; `lorafleet adapters show` takes a version")
        if not registry.versions(name):
            registry.find(name)  # a name that is not there has a nearest one to offer
    return Versions(tuple(registry.versions(name, what.tag)))


def show(reference: str, /, **knobs: Any) -> Shown:
    """One version, with its lineage and files."""
    (where,) = load_sections((RegistryConfig,), None, knobs)
    registry = _open(where)
    version = registry.find(reference)
    return Shown(version, str(registry.folder(version)), tuple(registry.history(version.name)))


def diff(references: Sequence[str], /, **knobs: Any) -> Difference:
    """What differs between two versions."""
    (where,) = load_sections((RegistryConfig,), None, knobs)
    if len(references) != 2:
        raise ConfigError(f"diff compares two versions; given are {len(references)}")
    registry = _open(where)
    one, other = map(registry.find, references)
    return differences(registry, one, other)


def promote(reference: str, /, **knobs: Any) -> Move:
    """Point an alias at a version."""
    where, which, what = load_sections((RegistryConfig, AliasConfig, PromoteConfig), None, knobs)
    return _open(where).promote(reference, which.alias, expect=None if what.expect == "none" else what.expect)


def rollback(name: str, /, **knobs: Any) -> Move:
    """Point an alias at the version that it was promoted from."""
    where, which = load_sections((RegistryConfig, AliasConfig), None, knobs)
    return _open(where).rollback(name, which.alias)


def verify(**knobs: Any) -> upkeep.VerifyResult:
    """Compare every file and row with its hash."""
    (where,) = load_sections((RegistryConfig,), None, knobs)
    return upkeep.verify(_open(where))


def gc(references: Sequence[str] = (), /, **knobs: Any) -> upkeep.GcResult:
    """Delete what is named, old, or unused."""
    where, what = load_sections((RegistryConfig, GcConfig), None, knobs)
    return upkeep.gc(_open(where), references, keep=what.keep, dry_run=what.dry_run)


def export_versions(references: Sequence[str], /, **knobs: Any) -> archive.ExportResult:
    """Write versions into one file."""
    where, what = load_sections((RegistryConfig, ExportConfig), None, knobs)
    if not references:
        raise ConfigError("name the versions to export")
    return archive.export_versions(_open(where), references, Path(what.output).expanduser())


def import_versions(file: str, /, **knobs: Any) -> Versions:
    """Add the versions of such a file."""
    where, what = load_sections((RegistryConfig, ImportConfig), None, knobs)
    return Versions(tuple(archive.import_versions(_open(where, create=True), Path(file).expanduser(), what.name)))


def _open(where: RegistryConfig, *, create: bool = False) -> Registry:
    return Registry(where.registry, where.registry_database, create=create)
