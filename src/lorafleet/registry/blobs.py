"""The registry's files, each named by the SHA-256 of its bytes: equal files are one, and none ever changes."""

import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from lorafleet.errors import ConfigError, RegistryError
from lorafleet.files.atomic import write_bytes, write_new_file
from lorafleet.models.digest import sha256_file

logger = logging.getLogger(__name__)

FOLDER = "blobs"
_IDENTITY = "registry.id"

_REMEDY = "add the adapter again to mend it (with the same --rejected, if it was)"

ABANDONED_SECONDS = 24 * 3600
"""What is temporary and this old is nobody's any more: its writer was killed."""


class Blobs(Protocol):
    """Where the files are."""

    def owner(self) -> str | None:
        """The id of the database that has the files' rows; None where that is not written yet."""

    def claim(self, identity: str) -> None:
        """Write it."""

    def put(self, digest: str, data: bytes) -> bool:
        """Keep a file, and say whether it replaced a damaged one. Nothing of it can be seen before all of it can."""

    def has(self, digest: str) -> bool:
        """Whether a file is there."""

    def read(self, digest: str) -> bytes:
        """A file's bytes, as they were put.

        Raises:
            RegistryError: It is missing or damaged.
        """

    def place(self, digest: str, path: Path) -> None:
        """Create a local file with a blob's bytes, checked."""

    def sizes(self) -> dict[str, int]:
        """The bytes of every file that is there."""

    def delete(self, digest: str) -> None:
        """Remove a file."""


class LocalBlobs:
    """Files in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def owner(self) -> str | None:
        """The id of the database that has the files' rows; None where that is not written yet."""
        path = self.folder.with_name(_IDENTITY)
        try:
            return path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RegistryError(f"cannot read the registry, {path}: {error.strerror or error}") from error

    def claim(self, identity: str) -> None:
        """Write it."""
        path = self.folder.with_name(_IDENTITY)
        try:
            write_bytes(path, identity.encode())
        except OSError as error:
            raise RegistryError(f"cannot write to the registry, {path}: {error.strerror or error}") from error

    def put(self, digest: str, data: bytes) -> bool:
        """Write a file and flush it to disk; one that is there already, and undamaged, stays."""
        path = self.folder / digest
        try:
            damaged = path.is_file() and sha256_file(path) != digest
            if damaged or not path.is_file():
                write_bytes(path, data)
                path.chmod(0o444)
        except OSError as error:
            raise RegistryError(f"cannot write to the registry, {path}: {error.strerror or error}") from error
        return damaged

    def has(self, digest: str) -> bool:
        """Whether a file is there."""
        return (self.folder / digest).is_file()

    def read(self, digest: str) -> bytes:
        """A file's bytes."""
        try:
            return _checked((self.folder / digest).read_bytes(), digest)
        except OSError as error:
            raise RegistryError(_missing(digest, error.strerror)) from error

    def place(self, digest: str, path: Path) -> None:
        """A second name of the same file where the file system has such, else a copy."""
        source = self.folder / digest
        if not source.is_file():
            raise RegistryError(_missing(digest))
        if sha256_file(source) != digest:
            raise RegistryError(_damaged(digest))
        try:
            os.link(source, path)
        except OSError:
            write_new_file(path, self.read(digest))

    def share(self, digest: str, path: Path) -> None:
        """Make a local file of a blob's bytes a second name of it; it stays a copy where the file system has none."""
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            os.link(self.folder / digest, beside)
            beside.replace(path)
        except OSError as error:
            logger.debug("%s stays a copy: %s", path, error)
        finally:
            beside.unlink(missing_ok=True)  # a rename onto another name of the same file leaves both

    def sizes(self) -> dict[str, int]:
        """The bytes of every file, those of writers that were killed included, under their names."""
        if not self.folder.is_dir():
            return {}
        found = {}
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # a writer has renamed it meanwhile, or a gc deleted it
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size
        return found

    def delete(self, digest: str) -> None:
        """Remove a file."""
        path = self.folder / digest
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RegistryError(f"cannot delete from the registry, {path}: {error.strerror or error}") from error


class RemoteBlobs:
    """Files in an object store that fsspec reaches (``s3://``, ``gs://``, ``abfs://`` …), whose puts are whole or not.

    Each method raises a :class:`RegistryError` where the store cannot be reached or refuses.

    Raises:
        ConfigError: fsspec does not know such a store, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        try:
            # A listing that is kept hides what other processes put and delete.
            self.store, root = url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"registry = {url!r} cannot be opened: {error}") from error
        self.root = f"{root.rstrip('/')}/{FOLDER}"
        self._whole: set[str] = set()  # files that this process has read or written; none ever changes

    def owner(self) -> str | None:
        """The id of the database that has the files' rows; None where that is not written yet."""
        path = f"{self.root.removesuffix(FOLDER)}{_IDENTITY}"
        with _told("read", path):
            if not self.store.exists(path):
                return None
            found: bytes = self.store.cat_file(path)
        return found.decode("utf-8", "replace")

    def claim(self, identity: str) -> None:
        """Write it."""
        path = f"{self.root.removesuffix(FOLDER)}{_IDENTITY}"
        with _told("write to", path):
            self.store.pipe_file(path, identity.encode())

    def put(self, digest: str, data: bytes) -> bool:
        """Upload a file that is not there yet, or damaged."""
        path, damaged = f"{self.root}/{digest}", False
        with _told("write to", path):
            there = self.store.exists(path)
            if there and digest not in self._whole:
                damaged = hashlib.sha256(self.store.cat_file(path)).hexdigest() != digest
            if damaged or not there:
                self.store.pipe_file(path, data)
        self._whole.add(digest)
        return damaged

    def has(self, digest: str) -> bool:
        """Whether a file is there."""
        path = f"{self.root}/{digest}"
        with _told("read", path):
            return bool(self.store.exists(path))

    def read(self, digest: str) -> bytes:
        """A file's bytes."""
        path = f"{self.root}/{digest}"
        with _told("read", path):
            try:
                data: bytes = self.store.cat_file(path)
            except FileNotFoundError as error:
                raise RegistryError(_missing(digest)) from error
        self._whole.discard(digest)
        _checked(data, digest)
        self._whole.add(digest)
        return data

    def place(self, digest: str, path: Path) -> None:
        """Download a file."""
        write_new_file(path, self.read(digest))

    def sizes(self) -> dict[str, int]:
        """The bytes of every file."""
        with _told("list", self.root):
            if not self.store.exists(self.root):
                return {}
            found: list[dict[str, Any]] = self.store.ls(self.root, detail=True)
        return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in found if entry["type"] == "file"}

    def delete(self, digest: str) -> None:
        """Remove a file."""
        path = f"{self.root}/{digest}"
        with _told("delete from", path):
            self.store.rm_file(path)


@contextmanager
def _told(what: str, path: str) -> Iterator[None]:
    """What a store raises, as an error of the registry: each store's package has errors of its own kind."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        raise RegistryError(f"cannot {what} the registry, {path}: {error or type(error).__name__}") from error


def open_blobs(location: str) -> Blobs:
    """The files of the registry at a local path or at a URL that fsspec knows."""
    scheme, found, rest = location.partition("://")
    if found and scheme not in ("file", "local"):
        return RemoteBlobs(location)
    return LocalBlobs(Path(rest if found else location).expanduser())


def _checked(data: bytes, digest: str) -> bytes:
    if hashlib.sha256(data).hexdigest() != digest:
        raise RegistryError(_damaged(digest))
    return data


def _damaged(digest: str) -> str:
    return f"the registry's file {digest} is damaged: its SHA-256 differs; {_REMEDY}"


def _missing(digest: str, reason: str | None = None) -> str:
    why = f" ({reason})" if reason else ""
    return f"the registry's file {digest} is missing{why}; {_REMEDY}"
