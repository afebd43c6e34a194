"""Versions in one file, to be carried to another registry.

A tar of ``registry.json`` (names, scores, tags, lineage, each file's hash) and ``blobs/<SHA-256>``. Nothing in it is
unpacked by the names that it gives.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.errors import AdapterError, ConfigError, RegistryError, raise_all
from lorafleet.files.atomic import json_bytes
from lorafleet.registry.contents import check_file_names, hashes
from lorafleet.registry.names import name_fault
from lorafleet.registry.registry import Registry
from lorafleet.registry.version import Version

_INDEX, _FORMAT = "registry.json", 1
_MOST_INDEX_BYTES = 64 << 20
_NOT_OURS = (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, RecursionError, AdapterError)


@dataclass(frozen=True)
class ExportResult:
    """A file of versions.

    Attributes:
        file: The file.
        versions: What is in it, as ``name:number``.
        bytes: Its size.
    """

    file: str
    versions: tuple[str, ...]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def export_versions(registry: Registry, references: Sequence[str], path: Path) -> ExportResult:
    """Write versions into one file.

    Raises:
        ConfigError: A reference is none, or the file exists.
        RegistryError: A version is missing or damaged, or the file cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists; give another --output")
    found = {version.label: version for version in map(registry.find, references)}
    keys = ("name", "rejected", "scores", "tags", "lineage", "files")
    entries = [{key: getattr(version, key) for key in keys} for version in found.values()]
    digests = dict.fromkeys(digest for version in found.values() for digest in version.files.values())
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with tarfile.open(partial, "w") as tar:
            _put(tar, _INDEX, json_bytes({"format": _FORMAT, "versions": entries}))
            for digest in digests:
                _put(tar, f"blobs/{digest}", registry.blobs.read(digest))
        partial.rename(path)
    except OSError as error:
        raise RegistryError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return ExportResult(str(path), tuple(found), path.stat().st_size)


def import_versions(registry: Registry, path: Path, name: str | None = None) -> list[Version]:
    """Add the versions in a file of :func:`export_versions`; what is there already stays as it is.

    Args:
        registry: Where to.
        path: The file.
        name: Another name; for a file of one name only.

    Raises:
        ConfigError: ``name`` is none, or the file has several names.
        RegistryError: The file cannot be read, is none of ours, or damaged; then nothing is added.
    """
    entries, members = _checked(path)
    names = {entry["name"] for entry in entries}
    if name is not None and len(names) > 1:
        raise ConfigError(f"{path} has adapters of {len(names)} names ({', '.join(sorted(names))}); leave out --name")
    chosen = [name or entry["name"] for entry in entries]
    raise_all(ConfigError, [fault for one in chosen if (fault := name_fault(one))], f"{path} cannot be imported")
    with tarfile.open(path, "r:") as tar:
        return [
            registry.put(
                {file: _get(tar, members[digest]) for file, digest in entry["files"].items()},
                entry["lineage"],
                one,
                entry["scores"],
                entry["tags"],
                entry["rejected"],
                again=False,
            )
            for one, entry in zip(chosen, entries, strict=True)
        ]


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _checked(path: Path) -> tuple[list[dict[str, Any]], dict[str, tarfile.TarInfo]]:
    """What a file says it has, and where its blobs are, all of them read and compared with their hashes."""
    try:
        # Neither compressed nor with holes: what is read is no more than the file's own bytes.
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar if member.isfile() and not member.issparse()}
            index = members.get(_INDEX)
            if index is None or index.size > _MOST_INDEX_BYTES:
                raise RegistryError(f"{path} has no {_INDEX}; it is no export of a registry")
            told = json.loads(_get(tar, index))
            if told.get("format") != _FORMAT:
                raise RegistryError(f"{path} has format {told.get('format')!r}; this release reads {_FORMAT}")
            entries = [_entry(entry) for entry in told["versions"]]
            digests = dict.fromkeys(digest for entry in entries for digest in entry["files"].values())
            blobs = {digest: members[f"blobs/{digest}"] for digest in digests}
            damaged = [digest for digest in blobs if hashes({"": _get(tar, blobs[digest])})[""] != digest]
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror or error}") from error
    except _NOT_OURS as error:
        raise RegistryError(f"{path} is damaged or no export of a registry: {error}") from error
    raise_all(RegistryError, [f"blob {digest} differs from its hash" for digest in damaged], f"{path} is damaged")
    return entries, blobs


def _entry(told: Mapping[str, Any]) -> dict[str, Any]:
    """One version of an index, in the types that it should have."""
    check_file_names(told["files"])
    return {
        "name": str(told["name"]),
        "rejected": None if told["rejected"] is None else str(told["rejected"]),
        "scores": {str(name): float(value) for name, value in told["scores"].items()},
        "tags": [str(tag) for tag in told["tags"]],
        "lineage": dict(told["lineage"]),
        "files": {str(file): str(digest) for file, digest in told["files"].items()},
    }


def _get(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # of a regular file there is one
    return file.read()
