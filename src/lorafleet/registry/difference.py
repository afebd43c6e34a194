"""What differs between two versions: settings, origin, scores, files, and how far their tensors are apart."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorafleet.files.adapter import CONFIG
from lorafleet.files.method import METHOD, load_saved
from lorafleet.registry.registry import Registry
from lorafleet.registry.version import Version


@dataclass(frozen=True)
class Difference:
    """Two versions side by side; what is equal is left out.

    Attributes:
        one: The first, as ``name:number``.
        other: The second.
        lineage: What they came from, both values by name.
        settings: Their configs, both values by key.
        scores: Measurements of either, both values by name.
        files: Names of files that differ.
        tensors: How many tensors are equal, changed, or in one of them only.
        distance: ``‖a − b‖ / ‖a‖`` over the tensors that both have, in the same shape; none where there is no such.
    """

    one: str
    other: str
    lineage: dict[str, tuple[Any, Any]]
    settings: dict[str, tuple[Any, Any]]
    scores: dict[str, tuple[float | None, float | None]]
    files: tuple[str, ...]
    tensors: dict[str, int]
    distance: float | None

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def differences(registry: Registry, one: Version, other: Version) -> Difference:
    """Compare two versions.

    Raises:
        RegistryError: A file is missing or damaged.
        AdapterError: A file is no adapter's.
    """
    tensors, distance = _tensors(registry, one, other)
    return Difference(
        one.label,
        other.label,
        _unequal(one.lineage, other.lineage),
        _unequal(_settings(registry, one), _settings(registry, other)),
        _unequal(one.scores, other.scores),
        tuple(sorted(dict(one.files.items() ^ other.files.items()))),
        tensors,
        distance,
    )


def _settings(registry: Registry, version: Version) -> dict[str, Any]:
    name = next(name for name in (METHOD, CONFIG) if name in version.files)
    settings: dict[str, Any] = json.loads(registry.blobs.read(version.files[name]))
    return settings


def _tensors(registry: Registry, one: Version, other: Version) -> tuple[dict[str, int], float | None]:
    a, b = (load_saved(registry.folder(version)).tensors for version in (one, other))
    shared = [name for name in a if name in b and a[name].shape == b[name].shape]
    equal = sum(bool((a[name] == b[name]).all()) for name in shared)
    counts = {"equal": equal, "changed": len(shared) - equal, "in one": len(a) - len(shared)}
    counts["in the other"] = len(b) - len(shared)
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in shared)
    whole = sum(float(a[name].double().square().sum()) for name in shared)
    return counts, (apart / whole) ** 0.5 if whole else None


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*one, *other])
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
