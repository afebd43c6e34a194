"""A run folder belongs to one run at a time, and says what made it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lorafleet
from lorafleet.config import LoraConfig
from lorafleet.errors import CheckpointError
from lorafleet.files.checkpoint import save_checkpoint
from lorafleet.files.run_folder import METRICS, SETTINGS, clear_run, lora_shape, model_card, open_run, provenance


def checkpoint(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, {"w": torch.ones(2)}, {})


def opened(folder: Path, resume: str | bool = False, overwrite: bool = False) -> Path | None:
    with open_run(folder, resume=resume, overwrite=overwrite) as start:
        return start


def test_a_new_folder_starts_at_the_beginning(tmp_path: Path) -> None:
    assert opened(tmp_path / "new" / "run") is None
    (tmp_path / "notes.txt").write_text("mine")
    assert opened(tmp_path) is None


@pytest.mark.parametrize("mark", ["adapter_config.json", METRICS, SETTINGS, "checkpoint"])
def test_another_run_is_not_touched(tmp_path: Path, mark: str) -> None:
    if mark == "checkpoint":
        checkpoint(tmp_path, 3)
    else:
        (tmp_path / mark).write_text("x")
    with pytest.raises(CheckpointError, match=r"holds another run.*--resume-from-checkpoint.*--overwrite"):
        opened(tmp_path)


def test_resume_takes_the_newest(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("r: 8")
    assert opened(tmp_path, resume=True) is None  # it stopped before its first checkpoint
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 20)
    assert opened(tmp_path, resume=True) == tmp_path / "checkpoint-20"
    assert opened(tmp_path, resume=str(tmp_path)) == tmp_path / "checkpoint-20"
    assert opened(tmp_path, resume=str(tmp_path / "checkpoint-3")) == tmp_path / "checkpoint-3"
    assert opened(tmp_path / "other", resume=str(tmp_path / "checkpoint-3")) == tmp_path / "checkpoint-3"


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run to resume in"):
        opened(tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()
    checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint-4; the newest in .* is checkpoint-3"):
        opened(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-3" / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"state.json"):
        opened(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    with pytest.raises(CheckpointError, match="contradict"):
        opened(tmp_path, resume=True, overwrite=True)
    checkpoint(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match="holds another run"):
        opened(tmp_path / "a", resume=str(checkpoint(tmp_path / "b", 1)))


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_files_of_the_user_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=rf"holds {name}, which a run would replace.*another --output-dir"):
        opened(tmp_path)
    with open_run(tmp_path, overwrite=True):
        assert (tmp_path / name).read_text() == "mine"  # until the run has something to put in its place


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoints_of_other_tools_are_not_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.pt").write_text("theirs")
    with pytest.raises(CheckpointError, match="holds checkpoint-500, which lorafleet did not write"):
        opened(tmp_path, overwrite=overwrite)
    assert (tmp_path / "checkpoint-500" / "optimizer.pt").read_text() == "theirs"


@pytest.mark.parametrize("name", ["adapter_config.json", "result.json"])
def test_a_finished_run_without_checkpoints_is_not_trained_again(tmp_path: Path, name: str) -> None:
    (tmp_path / SETTINGS).write_text("r: 8")
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"finished.*no checkpoint.*--overwrite"):
        opened(tmp_path, resume=True)


def test_clearing_deletes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", METRICS, SETTINGS, "README.md", "mine.txt"):
        (tmp_path / name).write_text("old")
    checkpoint(tmp_path, 3)
    (tmp_path / "data").mkdir()
    for name in ("combined/cat/lorafleet.json", "combined/mine/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    with open_run(tmp_path, overwrite=True) as start:
        assert start is None
        assert (tmp_path / "checkpoint-3").is_dir() and (tmp_path / SETTINGS).is_file()
        clear_run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {".lorafleet.lock"} == {"mine.txt", "data", "combined"}
    assert [path.name for path in (tmp_path / "combined").iterdir()] == ["mine"]


def test_clearing_keeps_the_checkpoint_that_the_run_starts_from(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 5)
    with open_run(tmp_path, resume=str(tmp_path / "checkpoint-3"), overwrite=True) as start:
        assert start == tmp_path / "checkpoint-3"
        clear_run(tmp_path, keep=start)
        assert start.is_dir()
    assert not (tmp_path / "checkpoint-5").exists()


def test_models_and_files_are_no_run_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a model"):
        opened(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        opened(tmp_path / "config.json")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys; from lorafleet.files.run_folder import open_run\n"
        "with open_run(sys.argv[1]) as start: print('holding', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(CheckpointError, match="another process is training in"):
            opened(tmp_path)
        other.kill()
        other.wait()
    assert opened(tmp_path) is None  # the lock dies with its holder


def test_the_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), open_run(tmp_path):
        raise ValueError("boom")
    assert opened(tmp_path) is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write in"):
        opened(tmp_path / "file" / "run")


def test_provenance() -> None:
    found = provenance()
    assert found["lorafleet"] == lorafleet.__version__
    assert found["packages"]["torch"] == torch.__version__
    commit = found["git_commit"]
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_model_card_is_yaml_and_tables_of_what_was_measured() -> None:
    card = model_card(
        title="first | run",
        base_name="/somewhere/private/my-base",
        shape=lora_shape(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
        data="reviews: 'quoted' & 100 rows",
        metrics_before={"loss": 3.25, "accuracy": 0.5},
        metrics={"loss": 1.5, "accuracy": 0.75, "macro_f1": 0.7},
        facts={"steps": 1200, "seconds": 61.23456, "resumed": False},
        made_by={"lorafleet": "1.0", "python": "3.12", "packages": {"torch": "2.9", "peft": None}},
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "my-base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorafleet", "base_model:adapter:my-base"],
    }
    assert "private" not in card
    assert "# first \\| run" in body
    assert "| loss | 3.25 | 1.5 |" in body
    assert "| macro_f1 | – | 0.7 |" in body
    assert "| effective scale | 2 |" in body
    assert "| steps | 1,200 |" in body
    assert "| target_modules | q_proj, v_proj |" in body
    assert "torch 2.9" in body
    assert "peft None" not in body
