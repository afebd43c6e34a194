"""From a name to files: folders, samples, hub ids, and what to say when there is nothing."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorafleet.data.sources import find_source, sample_names
from lorafleet.errors import DataError

ROW = json.dumps({"text": "hello"}) + "\n"


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    return folder


def splits(data: str | Path) -> dict[str, list[str]]:
    return {name: list(split.files) for name, split in find_source(str(data)).splits.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], {"train": 1, "valid": 1, "test": 1}),
        (["train.csv", "validation.csv"], {"train": 1, "valid": 1}),
        (["my-training.json", "my_dev.json", "my.eval.json"], {"train": 1, "valid": 1, "test": 1}),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.jsonl"], {"train": 2, "valid": 1}),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], {"train": 2, "test": 1}),
        (["train.jsonl.gz", "test.jsonl"], {"train": 1, "test": 1}),
        (["test.jsonl"], {"test": 1}),
        (["anything.jsonl", "README.md"], {"train": 1}),
        (["train.jsonl", "latest.jsonl", ".test.jsonl"], {"train": 1}),
    ],
)
def test_files_of_a_folder_are_sorted_into_splits_by_name(
    tmp_path: Path, names: list[str], expected: dict[str, int]
) -> None:
    found = splits(files(tmp_path, *names))
    assert {name: len(members) for name, members in found.items()} == expected
    assert list(found) == [name for name in ("train", "valid", "test") if name in found]


def test_files_that_belong_to_no_split_are_named(tmp_path: Path) -> None:
    assert find_source(str(files(tmp_path, "train.jsonl", "extra.jsonl"))).ignored == ("extra.jsonl",)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "has no data files"),
        (["notes.txt"], "has no data files"),
        (["a.jsonl", "b.jsonl"], "no file .* is called train, valid or test: a.jsonl, b.jsonl"),
        (["train.jsonl", "train.csv"], "has train rows more than once: train.csv, train.jsonl"),
        (["train.jsonl", "train.jsonl.gz"], "has train rows more than once"),
    ],
)
def test_folders_that_cannot_be_understood(tmp_path: Path, names: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        find_source(str(files(tmp_path, *names)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{folder}/trian.jsonl", "there is no file or folder .*trian.jsonl; did you mean 'train.jsonl'"),
        ("{folder}/nothing", "there is no file or folder"),
        ("./nothing", "there is no file or folder"),
        ("rows.jsonl", "there is no file or folder rows.jsonl"),
        ("rows.jsonll", "there is no file or folder"),
        ("/dev/null", "is no regular file"),
        ("a/b/c", "there is no file or folder"),
        ("", "data is empty"),
        (
            "sample:movie_polarty",
            "there is no sample 'movie_polarty'; there are general_chat, movie_polarity; did you mean 'movie_polarity'",
        ),
        ("movie_polarity", "did you mean sample:movie_polarity"),
        ("{folder}/notes.txt", "the suffix .txt is not known"),
    ],
)
def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, reason: str) -> None:
    monkeypatch.chdir(files(tmp_path, "train.jsonl", "notes.txt"))
    with pytest.raises(DataError, match=reason):
        find_source(data.format(folder=tmp_path))


def test_the_content_hash_follows_names_and_bytes_not_the_place(tmp_path: Path) -> None:
    one, two = files(tmp_path / "one", "train.jsonl"), files(tmp_path / "two", "train.jsonl")
    before = find_source(str(one)).content_hash
    assert find_source(str(two)).content_hash == before
    (two / "train.jsonl").write_text(ROW * 2)
    assert find_source(str(two)).content_hash != before


def test_the_packaged_sample_has_three_splits_and_its_attribution() -> None:
    assert sample_names() == ["general_chat", "movie_polarity"]
    source = find_source("sample:movie_polarity")
    counts = {name: sum(1 for _ in split.records()) for name, split in source.splits.items()}
    assert counts == {"train": 2300, "valid": 332, "test": 500}
    folder = next(iter(source.splits["train"].files.values())).parent
    assert "CC BY 4.0" in (folder / "ATTRIBUTION.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000


def hub_table(rows: list[dict[str, Any]], **kinds: Any) -> datasets.Dataset:
    table = datasets.Dataset.from_list(rows)
    for name, kind in kinds.items():
        table = table.cast_column(name, kind)
    return table


def test_hub_ids_go_to_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = datasets.ClassLabel(names=["bad", "good"])
    found = datasets.DatasetDict(
        {
            "train": hub_table([{"text": "a", "label": 1}, {"text": "b", "label": 0}], label=labels),
            "validation": hub_table([{"text": "c", "label": 1}], label=labels),
            "unsupervised": hub_table([{"text": "d", "label": 0}], label=labels),
        }
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: (asked.append(names), found)[1])
    source = find_source("org/films:plain")
    assert asked == [("org/films", "plain")]
    assert source.ignored == ("unsupervised",)
    rows = [(record.source, record.row) for split in source.splits.values() for record in split.records()]
    assert rows == [
        ("train:1", {"text": "a", "label": "good"}),
        ("train:2", {"text": "b", "label": "bad"}),
        ("validation:1", {"text": "c", "label": "good"}),
    ]


def test_a_hub_id_that_cannot_be_loaded_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*names: str) -> None:
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"org/films is no file or folder here, and .* cannot be loaded: no network$"):
        find_source("org/films")


def test_a_hub_data_set_without_known_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict({"corpus": hub_table([{"text": "a"}])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: found)
    with pytest.raises(DataError, match="has no split called train, valid or test: corpus"):
        find_source("org/films")
