"""Each user's rows go into that user's folder and into no other's."""

import hashlib
import json
import math
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorafleet.config.data import DataConfig
from lorafleet.config.fleet import UsersConfig
from lorafleet.data.conversation import BadRow, Conversation, Turn
from lorafleet.data.shapes import convert_row, detect_shape
from lorafleet.errors import CheckpointError, DataError
from lorafleet.fleets.users import KEYED, PLAIN, Users, clear_rows, kind_of, split_users


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
    assert rows_of(users.keyed["bob"], "test") == [{"text": "[bob] bob says 0", "label": "good"}]


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
            r"3 rows of .* cannot be given to a user: rows.jsonl:1: no 'usr'.*on_bad_rows: skip",
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


def split(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Users:
    """One file of rows, split."""
    file = write(tmp_path / "rows.jsonl", rows)
    return split_users(UsersConfig(data=str(file)), tmp_path / "out", 0, **changes)


def test_no_user_takes_the_name_of_a_shared_adapter(tmp_path: Path) -> None:
    keys = ["shared", "Shared", "shared keyed", "ann", "ann.keyed", "users", "train.jsonl"]
    users = split(tmp_path, [row for key in keys for row in user_rows(key, 4)])
    assert sorted(users.keys.values()) == sorted(keys)
    assert all(kind_of(name, users) == "user" for name in users.folders)
    for name, folder in users.folders.items():
        rows = rows_of(folder) + rows_of(folder, "test")
        assert len(rows) == 4 and all(row["text"].startswith(f"{users.keys[name]} says") for row in rows)
    for name, folder in users.keyed.items():
        key = users.keys[name]
        assert all(row["text"].startswith(f"[{key}] {key} says") for row in rows_of(folder, "test"))
    assert len(rows_of(users.shared[PLAIN])) == len(rows_of(users.shared[KEYED])) == 3 * len(keys)


def test_labels_are_those_that_the_loader_makes(tmp_path: Path) -> None:
    labels = [True, 1.0, " good ", 3, None, "good"]
    rows = [{"user": "ann", "text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    assert split(tmp_path, rows).labels == ["1", "3", "good", "true"]


def test_a_stray_label_beside_a_conversation_is_none(tmp_path: Path) -> None:
    rows = [{"user": "ann", "prompt": f"p {number}", "completion": "c", "label": "x"} for number in range(4)]
    assert split(tmp_path, rows).labels == []


def with_key(row: dict[str, Any]) -> Conversation:
    """A row as the loader reads it, with the key before the first turn that a user has."""
    found = convert_row(detect_shape([("", row)]), row)
    assert isinstance(found, Conversation)
    turns = list(found.turns)
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    turns[first] = Turn("user", f"[ann] {turns[first].content}", turns[first].trained)
    return Conversation(tuple(turns), found.references, found.answer)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}], "system": "s"},
        {"prompt": "hi", "completion": "x", "text": "stray"},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "x", "references": ["x", "y"]},
        {"instruction": "add", "input": "1 1", "output": "2", "answer": 2},
        {
            "messages": [{"role": "human", "value": "hi"}, {"role": "assistant", "content": "x", "weight": 0}] * 2
            + [{"role": "assistant", "content": "y"}]
        },
    ],
)
def test_the_key_stands_before_the_prompt_whatever_the_shape(tmp_path: Path, row: dict[str, Any]) -> None:
    users = split(tmp_path, [row | {"user": "ann"}] * 4)
    for keyed in (*rows_of(users.shared[KEYED]), *rows_of(users.keyed["ann"], "test")):
        assert convert_row("messages", keyed) == with_key(row)


def test_the_key_stands_before_no_answer(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "x"}
    rows = [
        [{"role": "system", "content": "s"}, answer],
        [answer, {"role": "user", "content": "hi"}, answer],
        [answer] * 2,
    ]
    users = split(tmp_path, [{"user": "ann", "messages": turns} for turns in rows for _ in range(2)], kinds=(KEYED,))
    keyed = rows_of(users.shared[KEYED]) + rows_of(users.shared[KEYED], "test")
    found = {tuple(turn["content"] for turn in row["messages"]) for row in keyed}
    assert found == {("[ann] s", "x"), ("x", "[ann] hi", "x"), ("x", "x")}


@pytest.mark.parametrize(
    "messages",
    [["hi"], [{"role": "user", "value": None}], [{"role": "user"}], "no list", [{"role": "user", "content": 3}]],
)
def test_a_row_that_cannot_be_used_stops_nobody(tmp_path: Path, messages: Any) -> None:
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
    rows = [{"user": "ann", "messages": good}] * 3 + [
        {"user": "bob", "messages": one} for one in [messages, *[good] * 3]
    ]
    users = split(tmp_path, rows)
    assert {*users.folders} == {"ann", "bob"}
    keyed = rows_of(users.shared[KEYED]) + rows_of(users.shared[KEYED], "test")
    assert len(keyed) == 7 and keyed.count({}) == 1, "an empty row keeps its place, and is left out by the loader"


def test_half_of_a_surrogate_pair_stays_one(tmp_path: Path) -> None:
    users = split(tmp_path, [*user_rows("ann", 4), {"user": "ann", "text": "half \ud800", "label": "good"}])
    rows = rows_of(users.folders["ann"]) + rows_of(users.folders["ann"], "test")
    assert {"text": "half \ud800", "label": "good"} in rows


@pytest.mark.parametrize("value", [datetime(2026, 11, 3, tzinfo=UTC), Decimal("1.5"), b"\x00", math.nan])
def test_parquet_values_that_json_has_no_form_for(tmp_path: Path, value: Any) -> None:
    """A column beside the row's own costs nothing; as a label, such a value is refused as the loader refuses it."""
    columns = {"user": ["ann"] * 4, "text": list("abcd"), "label": ["good"] * 4, "more": [value] * 4}
    for name, labels in (("beside", columns["label"]), ("label", columns["more"])):
        pq.write_table(pa.table(columns | {"label": labels}), tmp_path / f"{name}.parquet")
        config = UsersConfig(data=str(tmp_path / f"{name}.parquet"), min_rows=1)
        users = split_users(config, tmp_path / name, 0, DataConfig(data=config.data, data_format="text_label"))
        row = rows_of(users.folders["ann"])[0]
        if name == "beside":
            assert convert_row("text_label", row).label == "good"
        else:
            with pytest.raises(BadRow, match="label must be text or a whole number"):
                convert_row("text_label", row)


def test_plain_text_has_no_prompt_for_the_key(tmp_path: Path) -> None:
    users = split(tmp_path, [{"user": "ann", "text": f"line {number}"} for number in range(4)])
    assert {*users.shared} == {PLAIN} and not users.keyed
    assert "no prompt" in users.left_out[KEYED]


def test_only_the_shared_rows_that_are_asked_for_are_written(tmp_path: Path) -> None:
    assert {*split(tmp_path, user_rows("ann", 4), kinds=(PLAIN,)).shared} == {PLAIN}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ann", PLAIN}


def test_broken_rows_are_skipped_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "rows.jsonl", [*user_rows("ann", 4), {"text": "whose?", "label": "good"}])
    file.write_text(file.read_text() + '{"user": "ann", "text": \n')
    config, data = UsersConfig(data=str(file)), DataConfig(data="", on_bad_rows="skip")
    with pytest.raises(DataError, match=r"2 rows of .*rows.jsonl:5: no 'user'; rows.jsonl:6: broken JSON.*on_bad_rows"):
        split_users(config, tmp_path / "out", 0)
    users = split_users(config, tmp_path / "out", 0, data)
    assert len(rows_of(users.folders["ann"]) + rows_of(users.folders["ann"], "test")) == 4
    assert "2 rows" in caplog.text and "left out" in caplog.text


def test_no_question_is_trained_and_held_out(tmp_path: Path) -> None:
    rows = [
        {"user": "ann", "prompt": f"question {number // 3}", "completion": f"answer {number}"} for number in range(30)
    ]
    users = split(tmp_path, rows)
    asked = [{row["prompt"] for row in rows_of(users.folders["ann"], name)} for name in ("train", "test")]
    assert not asked[0] & asked[1]
    counts = Counter(row["prompt"] for row in rows_of(users.folders["ann"], "test"))
    assert {*counts.values()} == {3} and len(counts) == 2


def test_where_all_ask_the_same_something_is_held_out(tmp_path: Path) -> None:
    users = split(tmp_path, [{"user": "ann", "prompt": "?", "completion": f"a {number // 2}"} for number in range(10)])
    trained, tested = ({row["completion"] for row in rows_of(users.folders["ann"], name)} for name in ("train", "test"))
    assert len(tested) == 1 and not tested & trained


def test_the_draw_is_by_rows_where_all_questions_differ(tmp_path: Path) -> None:
    rows = user_rows("ann", 23)
    digest = int.from_bytes(hashlib.sha256(b"ann").digest()[:8])
    drawn = {*np.random.default_rng([0, digest]).permutation(23)[:5].tolist()}
    tested = rows_of(split(tmp_path, rows).folders["ann"], "test")
    assert [row["text"] for row in tested] == [rows[number]["text"] for number in sorted(drawn)]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_only_a_folder_of_a_fleet_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_rows(tmp_path / "rows")
    write(tmp_path / "rows" / "ann" / "train.jsonl", user_rows("ann", 1))
    with monkeypatch.context() as patch:
        patch.setattr("lorafleet.fleets.users.shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            clear_rows(tmp_path / "rows")
    clear_rows(tmp_path / "rows")  # a fleet that was killed there goes on
    assert not (tmp_path / "rows" / "ann").exists()
    (tmp_path / "mine").mkdir()
    clear_rows(tmp_path / "mine")
    notes = write(tmp_path / "other" / "notes.jsonl", user_rows("ann", 1))
    with pytest.raises(CheckpointError, match="other is where the users' rows go, and was not made by a fleet"):
        clear_rows(tmp_path / "other")
    assert notes.exists()
