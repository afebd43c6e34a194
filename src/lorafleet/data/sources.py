"""From what the user names to the files of each split: a file, a folder, a packaged sample, a hub id."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafleet.data.reading import Record, file_suffix, is_data_file, read_records
from lorafleet.errors import DataError, did_you_mean
from lorafleet.models.digest import remembered_sha256, sha256_json

SPLITS = ("train", "valid", "test")

# The words by which Hugging Face's datasets library tells splits from file names.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<name>[\w.-]+))?")
_SAMPLES = Path(__file__).parent.parent / "samples"


@dataclass(frozen=True)
class Split:
    """Where the rows of one split are: files, or a table of the datasets library."""

    files: dict[str, Path] = field(default_factory=dict)
    table: Any = None
    table_name: str = ""

    def records(self) -> Iterator[Record]:
        """Read the rows from the start, in order."""
        for name, path in self.files.items():
            yield from read_records(path, name)
        if self.table is not None:
            yield from _table_records(self.table, self.table_name)


@dataclass(frozen=True)
class Source:
    """All rows that the user named.

    Attributes:
        title: How the source is called in messages.
        splits: In the order train, valid, test; absent ones are left out.
        ignored: Names of files in the folder that belong to no split.
        content_hash: Changes with any byte or name of any file.
        bytes_hash: Changes with any byte, whatever the files are called.
    """

    title: str
    splits: dict[str, Split]
    ignored: tuple[str, ...]
    content_hash: str
    bytes_hash: str


def find_source(data: str) -> Source:
    """Find the files that ``data`` names.

    Args:
        data: A file, a folder, ``sample:NAME``, or a hub id (``org/name`` or ``org/name:config``).

    Raises:
        DataError: There is no such thing, or a folder's files cannot be told apart.
    """
    if data.startswith("sample:"):
        return _folder_source(_sample_folder(data.removeprefix("sample:")), data)
    if not data.strip():
        raise DataError("data is empty; name a file, a folder or a hub id")
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder_source(path, data)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{data} is no regular file; rows are read more than once, so write them to one")
        file_suffix(path)
        return _file_source(data, {"train": {path.name: path}}, ())
    if data in sample_names():
        raise DataError(f"there is no file or folder {data}; did you mean sample:{data}?")
    hub = _HUB_ID.fullmatch(data)
    if hub is None or _looks_like_a_path(data, path):
        raise DataError(f"there is no file or folder {data}{_neighbours(path)}")
    return _hub_source(data, hub["id"], hub["name"])


def sample_names() -> list[str]:
    """The names of the data sets that come with the package."""
    return sorted(folder.name for folder in _SAMPLES.iterdir() if folder.is_dir() and not folder.name.startswith("_"))


def _sample_folder(name: str) -> Path:
    names = sample_names()
    if name not in names:
        raise DataError(f"there is no sample {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}")
    return _SAMPLES / name


def _looks_like_a_path(data: str, path: Path) -> bool:
    """True where a hub id was hardly meant: ``rows.jsonl``, ``./rows``, ``folder-that-is-here/rows``."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".xlsx"):
        return True
    if "/" not in data:
        return "." in data or data.startswith("~")
    return path.is_absolute() or data.startswith((".", "~")) or path.parent.is_dir()


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [neighbour.name for neighbour in path.parent.iterdir()])


def _file_source(title: str, splits: dict[str, dict[str, Path]], ignored: tuple[str, ...]) -> Source:
    ordered = {split: Split(splits[split]) for split in SPLITS if split in splits}
    try:
        hashes = {split: {name: remembered_sha256(path) for name, path in splits[split].items()} for split in ordered}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    nameless = {split: list(files.values()) for split, files in hashes.items()}
    return Source(title, ordered, ignored, sha256_json(hashes), sha256_json(nameless))


def _folder_source(folder: Path, title: str) -> Source:
    """Sort a folder's files into splits by their names; look one level down where the folder itself has none."""
    files = sorted(path for path in folder.iterdir() if is_data_file(path))
    if not files:
        files = sorted(
            path for path in folder.glob("*/*") if is_data_file(path) and not path.parent.name.startswith(".")
        )
    if not files:
        raise DataError(f"the folder {title} has no data files (jsonl, json, csv, tsv, parquet)")
    splits: dict[str, dict[str, Path]] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if split := _split_of(name):
            splits.setdefault(split, {})[name] = path
    if not splits and len(files) == 1:
        splits = {"train": {files[0].name: files[0]}}
    if not splits:
        raise DataError(
            f"no file in the folder {title} is called train, valid or test: "
            f"{', '.join(path.name for path in files[:10])}. Rename them, or name one file"
        )
    for split, members in splits.items():
        if len({file_suffix(path) for path in members.values()}) > 1 or len(members) != len(_stems(members)):
            raise DataError(
                f"the folder {title} has {split} rows more than once: {', '.join(members)}; keep one format"
            )
    used = {name for members in splits.values() for name in members}
    names = (path.relative_to(folder).as_posix() for path in files)
    return _file_source(title, splits, tuple(name for name in names if name not in used))


def _stems(names: dict[str, Path]) -> set[str]:
    return {name.removesuffix(".gz") for name in names}


def _split_of(name: str) -> str | None:
    """The split that a file belongs to, by the words in its path; the first word that names a split decides."""
    words = re.split(r"[^a-z]+", name.lower())
    for word in words[:-1]:
        for split, its_words in _SPLIT_WORDS.items():
            if word in its_words:
                return split
    return None


def _hub_source(title: str, hub_id: str, name: str | None) -> Source:
    import datasets  # takes a second to import, and only hub ids need it

    try:
        found = datasets.load_dataset(hub_id, name)
    except Exception as error:  # the library raises what its transports raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{title} is no file or folder here, and the hub's data set {hub_id} cannot be loaded: {reason}"
        ) from error
    splits: dict[str, Split] = {}
    for key, table in found.items():
        split = _split_of(f"{key}.")
        if split is not None and split not in splits:
            splits[split] = Split(table=table, table_name=str(key))
    if not splits:
        raise DataError(
            f"the hub's data set {title} has no split called train, valid or test: {', '.join(map(str, found))}"
        )
    used = {split.table_name for split in splits.values()}
    prints = {split: splits[split].table._fingerprint for split in splits}
    ignored = tuple(str(key) for key in found if str(key) not in used)
    digest = sha256_json(prints)
    return Source(title, {split: splits[split] for split in SPLITS if split in splits}, ignored, digest, digest)


def _table_records(table: Any, name: str) -> Iterator[Record]:
    """Rows of a datasets table; numbers of a label class become the label's name."""
    names = {key: kind.names for key, kind in table.features.items() if hasattr(kind, "names")}
    for number, row in enumerate(table, start=1):
        for key, labels in names.items():
            if isinstance(row[key], int) and 0 <= row[key] < len(labels):
                row[key] = labels[row[key]]
        yield Record(f"{name}:{number}", row)
