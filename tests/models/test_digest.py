"""A base or tokenizer that changed has another hash; one that only moved has the same."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from lorafleet.errors import ModelError
from lorafleet.models import digest
from lorafleet.models.digest import remembered_sha256, sha256_file, tokenizer_hash, weight_files, weights_hash
from tests.tiny import tiny_base_folder, tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED_SECONDS", -1.0)


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.mark.usefixtures("settled")
def test_a_remembered_hash_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = remembered_sha256(path)
    monkeypatch.setattr(digest, "sha256_file", lambda _: pytest.fail("computed again"))
    assert remembered_sha256(path) == first


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("how", ["rewritten", "same size and times", "another file"])
def test_a_change_is_seen(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    times = path.stat()
    first = remembered_sha256(path)
    time.sleep(0.02)  # past the resolution of a file's times
    if how == "another file":
        (tmp_path / "y").write_bytes(b"two")
        os.utime(tmp_path / "y", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(tmp_path / "y", path)
    else:
        path.write_bytes(b"two")
    if how == "same size and times":
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered_sha256(path) == hashlib.sha256(b"two").hexdigest() != first


def test_a_fresh_file_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "x").write_bytes(b"one")
    remembered_sha256(tmp_path / "x")
    assert not own_cache.exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("note", ["", "{", "[]", '{"key": 3}'])
def test_a_damaged_note_is_written_again(tmp_path: Path, own_cache: Path, note: str) -> None:
    (tmp_path / "x").write_bytes(b"one")
    wanted = remembered_sha256(tmp_path / "x")
    (path,) = (own_cache / "digests").iterdir()
    path.write_text(note)
    assert remembered_sha256(tmp_path / "x") == wanted
    assert json.loads(path.read_text())["sha256"] == wanted


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.write_text("a file where a folder should be")
    (tmp_path / "x").write_bytes(b"one")
    caplog.set_level("INFO")
    assert remembered_sha256(tmp_path / "x") == hashlib.sha256(b"one").hexdigest()
    assert "cannot remember a file's hash" in caplog.text


def test_weights_hash_moves_with_the_folder_and_changes_with_any_byte(tmp_path: Path) -> None:
    folder = tiny_base_folder(tmp_path / "a", "llama")
    files = [*weight_files(folder), folder / "config.json"]
    first = weights_hash(files)
    shutil.copytree(folder, tmp_path / "b")
    moved = [tmp_path / "b" / path.name for path in files]
    assert weights_hash(moved) == first
    for path in moved:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert weights_hash(moved) != first
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert weights_hash(moved) == first


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "b.safetensors").write_bytes(b"")
    (tmp_path / "a.safetensors").write_bytes(b"")
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}))
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    for bad in ("../evil.safetensors", "/etc/hostname", "absent.safetensors"):
        index.write_text(json.dumps({"weight_map": {"x": bad}}))
        with pytest.raises(ModelError, match="not in the folder"):
            weight_files(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ModelError, match="is damaged"):
            weight_files(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors"):
        weight_files(tmp_path)


def test_tokenizer_hash_is_of_what_it_does_not_of_what_it_did() -> None:
    tokenizer = tiny_tokenizer()
    first = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == first == tokenizer_hash(tiny_tokenizer())
    assert tokenizer_hash(tiny_tokenizer(chat_template=False)) != first
    tokenizer.pad_token = "<|im_end|>"
    assert tokenizer_hash(tokenizer) != first
    grown = tiny_tokenizer()
    grown.add_tokens(["<|new|>"])
    assert tokenizer_hash(grown) != first


def test_tokenizer_hash_is_the_hash_of_rules_special_tokens_and_template() -> None:
    tokenizer = tiny_tokenizer()
    for template in (None, "{{ messages }}", {"default": "a", "tool": "\ud800"}):
        tokenizer.chat_template = template
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        whole = {
            "rules": {name: part for name, part in rules.items() if name not in ("truncation", "padding")},
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": template,
        }
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        wanted = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        assert tokenizer_hash(tokenizer) == tokenizer_hash(tokenizer) == wanted
