"""Each user's rows go into that user's folder and into no other's."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.config.fleet import UsersConfig
from lorafleet.errors import DataError
from lorafleet.fleets.users import KEYED, PLAIN, keyed_folder, split_users


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def user_rows(user: Any, count: int, label: str = "good") -> list[dict[str, Any]]:
    return [{"user": user, "text": f"{user} says {number}", "label": label} for number in range(count)]


def test_rows_are_their_users(tmp_path: Path) -> None:
    train = user_rows("ann", 3) + user_rows("bob", 2, "bad") + user_rows("ann", 2)
    write(tmp_path / "data" / "train.jsonl", train)
    write(tmp_path / "data" / "test.jsonl", user_rows("bob", 1) + user_rows("ann", 1))
    users = split_users(UsersConfig(data=str(tmp_path / "data")), tmp_path / "out", 0)
    assert (list(users.folders), users.labels) == (["ann", "bob"], ["bad", "good"])
    for name, count in (("ann", 5), ("bob", 2)):
        rows = rows_of(users.folders[name]) + rows_of(users.folders[name], "test")
        assert len(rows) == count + 1
        assert all(row["text"].startswith(name) and "user" not in row for row in rows)
    assert len(rows_of(users.shared[PLAIN])) == 7
    assert rows_of(users.shared[KEYED])[0]["text"] == "[ann] ann says 0"
    keyed = keyed_folder(users, "bob", tmp_path / "out")
    assert rows_of(keyed, "test") == [{"text": "[bob] bob says 0", "label": "good"}]


def test_rows_are_held_out_of_each_user_where_there_is_no_test_file(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", user_rows("ann", 10) + user_rows("bob", 2) + user_rows("cy", 1))
    config = UsersConfig(data=str(tmp_path / "rows.jsonl"), min_rows=1)
    users = split_users(config, tmp_path / "out", 0)
    counts = {name: (len(rows_of(f)), len(rows_of(f, "test"))) for name, f in users.folders.items()}
    assert counts == {"ann": (8, 2), "bob": (1, 1)}
    assert users.left_out == {"cy": "no row to test on"}
    again = split_users(config, tmp_path / "again", 0)
    assert rows_of(again.folders["ann"], "test") == rows_of(users.folders["ann"], "test")
    other = split_users(config, tmp_path / "other", 1)
    assert rows_of(other.folders["ann"], "test") != rows_of(users.folders["ann"], "test")


def test_a_user_with_too_few_rows_is_left_out_alone(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", user_rows("ann", 10) + user_rows("bob", 1))
    users = split_users(UsersConfig(data=str(tmp_path / "rows.jsonl"), min_rows=3), tmp_path / "out", 0)
    assert list(users.folders) == ["ann"]
    assert users.left_out == {"bob": "1 training rows; min_rows is 3"} or "0 training rows" in users.left_out["bob"]
    assert all("bob" not in row["text"] for row in rows_of(users.shared[PLAIN]))


def test_keys_that_are_no_names_get_one_each(tmp_path: Path) -> None:
    keys = ["Hamlet / Ghost", "Hamlet - Ghost", "../../etc", "苏轼", "//", 17]
    write(tmp_path / "rows.jsonl", [row for key in keys for row in user_rows(key, 4)])
    users = split_users(UsersConfig(data=str(tmp_path / "rows.jsonl")), tmp_path / "out", 0)
    assert list(users.keys.values()) == [str(key) for key in keys]
    assert len({str(folder).lower() for folder in users.folders.values()}) == len(keys)
    assert all(folder.resolve().parent == (tmp_path / "out").resolve() for folder in users.folders.values())
    assert {"Hamlet - Ghost", "苏轼", "17"} <= users.folders.keys()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (user_rows("ann", 3), "has the user key 'usr'; they have label, text, user; did you mean 'user'?"),
        (
            [*user_rows("ann", 3), {"usr": "x", "text": "y", "label": "z"}],
            r"3 rows have no user: rows.jsonl:1: no 'usr'",
        ),
        ([{"usr": "ann", "text": "x", "label": "y"}], r"no user of .* has enough rows: ann \("),
    ],
)
def test_rows_that_cannot_be_told_apart(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        split_users(UsersConfig(data=str(tmp_path / "rows.jsonl"), key="usr"), tmp_path / "out", 0)


def test_conversations_get_the_key_in_their_first_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "x"},
    ]
    write(tmp_path / "rows.jsonl", [{"user": "ann", "messages": turns}] * 4)
    users = split_users(UsersConfig(data=str(tmp_path / "rows.jsonl")), tmp_path / "out", 0)
    assert [m["content"] for m in rows_of(users.shared[KEYED])[0]["messages"]] == ["s", "[ann] hi", "x"]
    assert users.labels == []
