"""Revisions laid out as folders, for what loads adapters from folders. Each can be made again from the files."""

import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lorafleet.errors import RegistryError
from lorafleet.files.atomic import sync_folder
from lorafleet.models.digest import sha256_file
from lorafleet.registry.blobs import ABANDONED_SECONDS, Blobs, LocalBlobs
from lorafleet.registry.version import Version


class Folders:
    """The folders of one registry's revisions; each appears, and goes, as a whole.

    Args:
        path: Where they are.
        blobs: The files.
    """

    def __init__(self, path: Path, blobs: Blobs) -> None:
        self.path, self.blobs = path, blobs

    def lay_out(self, version: Version) -> Path:
        """The folder of a version's files, made where it is missing.

        Raises:
            RegistryError: A file is missing or damaged, or the disk is full.
        """
        final = self.path / version.revision
        if final.is_dir():
            return final
        partial = self._aside(version.revision)
        try:
            partial.mkdir(parents=True)
            for name, digest in version.files.items():
                self.blobs.place(digest, partial / name)
            sync_folder(partial)
            partial.rename(final)
        except OSError as error:
            if not final.is_dir():  # else another process was first
                raise RegistryError(f"cannot lay out {version.label} in {final}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def drop(self, revisions: Iterable[str]) -> None:
        """Remove the folders of revisions, each first out of sight: nobody finds a half of one."""
        for revision in revisions:
            aside = self._aside(revision)
            try:
                (self.path / revision).rename(aside)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise RegistryError(
                    f"cannot delete {self.path / revision} from the registry: {error.strerror or error}"
                ) from error
            shutil.rmtree(aside, ignore_errors=True)

    def sweep(self, kept: Collection[str]) -> None:
        """Remove the folders of all other revisions, and what processes that were killed have left."""
        self.drop([name for name in self._names() if not name.startswith(".") and name not in kept])
        for name in self._names():
            if name.startswith(".") and name.endswith(".tmp") and _is_old(self.path / name):
                shutil.rmtree(self.path / name, ignore_errors=True)

    def faults(self, revisions: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Files in the folders of revisions that are not what the registry has; by revision the hash of each name."""
        return [
            f"{path} differs from its file in the registry; delete its folder, it is laid out anew when it is used"
            for revision in self._names()
            for name, digest in revisions.get(revision, {}).items()
            if not self._is_whole(path := self.path / revision / name, digest)
        ]

    def _is_whole(self, path: Path, digest: str) -> bool:
        try:
            here = isinstance(self.blobs, LocalBlobs) and self.blobs.folder / digest
            if here and here.is_file() and path.samefile(here):
                return True  # whatever is wrong with it is wrong with the registry's file
            return sha256_file(path) == digest
        except FileNotFoundError:
            return not path.parent.is_dir()  # a gc has taken the folder meanwhile

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def _aside(self, revision: str) -> Path:
        return self.path / f".{revision[:16]}.{secrets.token_hex(4)}.tmp"


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False
