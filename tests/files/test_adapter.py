"""Hostile, damaged and foreign adapter folders are refused by name; nothing in them runs."""

import errno
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafleet.config import LoraConfig
from lorafleet.errors import AdapterError
from lorafleet.files.adapter import load_adapter, save_adapter
from tests.files.faults import count_calls, failing_disk

PRE = "base_model.model."
QUERY = f"{PRE}model.layers.0.self_attn.q_proj"
CONFIG = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="attention")


def tensors_for(*modules: str, rank: int = 2, value: float = 1.0) -> dict[str, Tensor]:
    found = {}
    for module in modules or ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        found[f"{PRE}{module}.lora_A.weight"] = torch.full((rank, 8), value)
        found[f"{PRE}{module}.lora_B.weight"] = torch.full((6, rank), value)
    return found


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    save_adapter(folder, CONFIG, tensors_for(), base_name="org/base", base_revision="abc", metadata={"loss": 1.5})
    return folder


@pytest.fixture
def pefts(ours: Path) -> Path:
    """As PEFT would have written it: no lorafleet.json."""
    (ours / "lorafleet.json").unlink()
    return ours


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def resave(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_round_trip(ours: Path) -> None:
    adapter = load_adapter(ours)
    assert adapter.base_name == "org/base"
    assert adapter.base_revision == "abc"
    assert adapter.metadata == {"loss": 1.5}
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert adapter.config == CONFIG.model_copy(update={"target_modules": modules})
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in tensors_for().items())
    assert adapter.tensors.keys() == tensors_for().keys()


def test_saving_twice_gives_the_same_bytes(ours: Path, tmp_path: Path) -> None:
    save_adapter(
        tmp_path / "again", CONFIG, tensors_for(), base_name="org/base", base_revision="abc", metadata={"loss": 1.5}
    )
    for path in ours.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_saving_refuses_wrong_tensors_and_lists_them(tmp_path: Path) -> None:
    tensors = tensors_for()
    tensors[f"{QUERY}.lora_A.weight"][0, 0] = float("nan")
    tensors[f"{QUERY}.lora_C.weight"] = torch.ones(1)
    del tensors[f"{PRE}model.layers.1.self_attn.q_proj.lora_B.weight"]
    with pytest.raises(AdapterError, match=r"(?s)3 faults.*missing tensor .*1.*lora_B.*surplus .*lora_C.*NaN"):
        save_adapter(tmp_path / "x", CONFIG, tensors, base_name="b", metadata={})
    with pytest.raises(AdapterError, match="no lora_A or lora_B"):
        save_adapter(tmp_path / "x", CONFIG, {}, base_name="b", metadata={})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_old_adapter_good(tmp_path: Path, error: int) -> None:
    def save(folder: Path, value: float) -> None:
        save_adapter(folder, CONFIG, tensors_for(value=value), base_name="b", metadata={"value": value})

    save(tmp_path / "dry", 1.0)
    for call in range(1, count_calls(lambda: save(tmp_path / "dry", 2.0)) + 1):
        folder = tmp_path / str(call)
        save(folder, 1.0)
        failed = ""
        try:
            with failing_disk(call, error):
                save(folder, 2.0)
        except AdapterError as raised:
            failed = str(raised)
        assert not failed or os.strerror(error) in failed
        wanted = 1.0 if failed else 2.0
        adapter = load_adapter(folder)
        assert adapter.metadata == {"value": wanted}
        assert float(adapter.tensors[f"{QUERY}.lora_A.weight"][0, 0]) == wanted


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_flipped_bits_are_found(ours: Path, name: str) -> None:
    data = (ours / name).read_bytes()
    for position in range(0, len(data), 37):
        changed = bytearray(data)
        changed[position] ^= 4
        (ours / name).write_bytes(changed)
        with pytest.raises(AdapterError, match=name):
            load_adapter(ours)


def test_a_changed_file_names_the_remedy(ours: Path) -> None:
    edit(ours, r=4)
    with pytest.raises(
        AdapterError, match=r"adapter_config.json is not the file that was saved.*delete lorafleet.json"
    ):
        load_adapter(ours)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_unread(pefts: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (pefts / "adapter_model.safetensors").unlink()
    (pefts / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterError, match=rf"{name} is pickled.*save_pretrained"):
        load_adapter(pefts)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_named_safetensors_does_not_run(pefts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (pefts / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged"):
        load_adapter(pefts)
    assert not (tmp_path / "exploded").exists()


def test_code_that_a_config_names_is_not_imported(pefts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_library.py").write_text("import os; os.mkdir(os.environ['BOMB'])")
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    monkeypatch.syspath_prepend(tmp_path)
    edit(pefts, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_library"})
    load_adapter(pefts)  # PEFT writes this field itself, so it is allowed, and left alone
    edit(pefts, auto_map={"AutoConfig": "evil_library.Evil"}, custom_module="evil_library")
    with pytest.raises(AdapterError, match=r"(?s)auto_map is .*custom_module is"):
        load_adapter(pefts)
    assert "evil_library" not in sys.modules
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "lorafleet.json"])
@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_links_out_of_the_folder_are_refused(ours: Path, tmp_path: Path, name: str, how: str) -> None:
    outside = tmp_path / f"outside-{name}"
    shutil.move(ours / name, outside)
    (ours / name).symlink_to(outside if how == "absolute" else Path("..") / outside.name)
    with pytest.raises(AdapterError, match=r"is a link to .*outside its folder"):
        load_adapter(ours)


def test_links_inside_the_folder_and_in_the_hubs_cache_work(ours: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--adapter"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in ours.iterdir():
        shutil.copy(path, repository / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    load_adapter(snapshot)
    (ours / "real.json").write_bytes((ours / "adapter_config.json").read_bytes())
    (ours / "adapter_config.json").unlink()
    (ours / "adapter_config.json").symlink_to("real.json")
    load_adapter(ours)
    (tmp_path / "link").symlink_to(ours)
    load_adapter(tmp_path / "link")


def test_what_is_no_file(pefts: Path, tmp_path: Path) -> None:
    path = pefts / "adapter_model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterError, match="no regular file"):
        load_adapter(pefts)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(AdapterError, match="a link to nothing"):
        load_adapter(pefts)
    path.unlink()
    path.mkdir()
    with pytest.raises(AdapterError, match="no regular file"):
        load_adapter(pefts)
    with pytest.raises(AdapterError, match="no adapter folder at"):
        load_adapter(tmp_path / "absent")
    with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": ' * 50_000, "\x00", "{'r': 1}"])
def test_damaged_configs(pefts: Path, text: str) -> None:
    (pefts / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config.json (is no valid JSON|holds a JSON)"):
        load_adapter(pefts)


def test_a_huge_config_is_refused_by_its_size(pefts: Path) -> None:
    with (pefts / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 34)  # sparse
    started = time.perf_counter()
    with pytest.raises(AdapterError, match="is no adapter's config"):
        load_adapter(pefts)
    assert time.perf_counter() - started < 1


def header(entries: dict[str, Any], size: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        header({}, 1 << 62),
        header({}, 99_999_999),
        header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}) + bytes(8),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(4),
        header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": 3}),
        b"\x10" + bytes(7) + b"x" * 16,
    ],
)
def test_hostile_safetensors_are_refused_fast(pefts: Path, data: bytes) -> None:
    (pefts / "adapter_model.safetensors").write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged"):
        load_adapter(pefts)
    assert time.perf_counter() - started < 1


def test_truncation_anywhere_is_found(pefts: Path) -> None:
    path = pefts / "adapter_model.safetensors"
    data = path.read_bytes()
    for length in range(0, len(data), 23):
        path.write_bytes(data[:length])
        with pytest.raises(AdapterError, match="is damaged"):
            load_adapter(pefts)


def test_every_wrong_tensor_is_listed(pefts: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{QUERY}.lora_B.weight"]
        tensors["stranger"] = torch.ones(1)
        tensors[f"{PRE}model.norm.weight"] = torch.ones(4)
        tensors[f"{PRE}model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 8)
        tensors[f"{PRE}model.layers.1.self_attn.q_proj.lora_B.weight"] = torch.full((6, 2), float("inf"))

    resave(pefts, change)
    with pytest.raises(AdapterError) as raised:
        load_adapter(pefts)
    text = str(raised.value)
    assert "5 faults" in text
    assert f"missing tensor {QUERY}.lora_B.weight" in text
    assert "surplus tensor stranger" in text
    assert f"surplus tensor {PRE}model.norm.weight" in text
    assert "has shape (3, 8); with rank 2 it is (2, in)" in text
    assert "holds NaN or infinity" in text


def test_a_rank_that_is_not_the_configs(pefts: Path) -> None:
    edit(pefts, r=3)
    with pytest.raises(AdapterError, match=r"(?s)4 faults.*with rank 3 it is \(3, in\)"):
        load_adapter(pefts)
    edit(pefts, rank_pattern={"q_proj": 2})
    assert load_adapter(pefts).config.rank_pattern == {"q_proj": 2}


def test_a_saved_module_without_tensors(pefts: Path) -> None:
    edit(pefts, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="modules_to_save names 'lm_head', but no tensor"):
        load_adapter(pefts)


def test_dora_without_its_magnitudes(pefts: Path) -> None:
    edit(pefts, use_dora=True)
    with pytest.raises(AdapterError, match=r"missing tensor base_model\.model\..*\.lora_magnitude_vector"):
        load_adapter(pefts)


def test_what_plain_lora_is_not_is_named_together(pefts: Path) -> None:
    asked = {
        "lora_bias": True,
        "megatron_config": {"x": 1},
        "trainable_token_indices": [5],
        "layer_replication": [[0, 1]],
        "target_parameters": ["experts.w"],
        "alora_invocation_tokens": [1],
        "use_qalora": True,
        "kasa_config": {"a": 1},
        "some_future_option": "on",
    }
    edit(pefts, init_lora_weights="pissa_niter_4", task_type="SEQ_CLS", **asked)
    with pytest.raises(AdapterError) as raised:
        load_adapter(pefts)
    assert all(f"{name} is " in str(raised.value) for name in [*asked, "init_lora_weights", "task_type"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": "eight"}, "r: "),
        ({"r": 0}, "r: "),
        ({"lora_alpha": None, "r": [1]}, "r: "),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": 3}, "target_modules"),
        ({"rank_pattern": {"(": 3}}, "no valid regex"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"bias": "some"}, "bias: "),
        ({"modules_to_save": "lm_head"}, "modules_to_save: "),
    ],
)
def test_wrong_fields_are_named(pefts: Path, fields: dict[str, Any], message: str) -> None:
    edit(pefts, **fields)
    with pytest.raises(AdapterError) as raised:
        load_adapter(pefts)
    assert message in str(raised.value)


def test_options_that_are_off_are_ignored(pefts: Path) -> None:
    off = {"use_dora": False, "future": None, "more": [], "other": {}, "peft_version": "9.9", "qalora_group_size": 16}
    edit(
        pefts, **off, loftq_config={}, megatron_core="megatron.core", layers_to_transform=None, init_lora_weights="eva"
    )
    assert load_adapter(pefts).config.init_lora_weights == "default"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1}', '{"format": 1, "sha256": 3, "metadata": {}}', "[" * 100_000]
)
def test_damaged_manifests(ours: Path, text: str) -> None:
    (ours / "lorafleet.json").write_text(text)
    with pytest.raises(AdapterError, match=r"lorafleet.json is damaged"):
        load_adapter(ours)


def test_a_manifest_that_leaves_hashes_out_vouches_for_nothing(ours: Path) -> None:
    (ours / "lorafleet.json").write_text('{"format": 1, "sha256": {}, "metadata": {}}')
    with pytest.raises(AdapterError, match="2 faults"):
        load_adapter(ours)
    (ours / "lorafleet.json").write_text('{"format": 2, "sha256": {}, "metadata": {}}')
    with pytest.raises(AdapterError, match="format 2"):
        load_adapter(ours)


def test_long_lists_of_faults_are_cut(pefts: Path) -> None:
    resave(pefts, lambda tensors: tensors.update({f"stranger{i}": torch.ones(1) for i in range(100)}))
    with pytest.raises(AdapterError, match="and 80 more") as raised:
        load_adapter(pefts)
    assert len(str(raised.value)) < 3000
