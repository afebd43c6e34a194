"""The folder of one run: who may write in it, what it records, and its model card."""

import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import lorafleet
from lorafleet.config.lora import LoraConfig
from lorafleet.errors import CheckpointError
from lorafleet.files.adapter import CONFIG, WEIGHTS
from lorafleet.files.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from lorafleet.files.checkpoint import load_checkpoint, newest_checkpoint
from lorafleet.files.manifest import MANIFEST
from lorafleet.files.method import METHOD, METHOD_WEIGHTS
from lorafleet.files.page import markdown_cell, markdown_table
from lorafleet.models.machine import package_versions

logger = logging.getLogger(__name__)

SETTINGS, METRICS, RESULT, CARD = "lorafleet.yaml", "metrics.jsonl", "result.json", "README.md"
TEMPLATE = "chat_template.jinja"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"),
)
"""What tokenizers of transformers write, each some of these."""

_MARKS = (CONFIG, METRICS, SETTINGS)  # any of these means that a run was here
_OWN = (
    *(*_MARKS, WEIGHTS, MANIFEST, METHOD, METHOD_WEIGHTS, CARD, "provenance.json", RESULT, "loss.png"),
    *(TEMPLATE, *TOKENIZER),
    *("study.db", "study.db.lock", "report.md", "report.html", "fleet.json"),
)
_LOCK = ".lorafleet.lock"


@contextmanager
def open_run(output_dir: str | Path, *, resume: str | bool = False, overwrite: bool = False) -> Iterator[Path | None]:
    """Take a run folder for the length of a ``with`` block, so that no second process writes in it.

    Args:
        output_dir: The folder; created where missing.
        resume: ``True`` for the newest complete checkpoint in ``output_dir``; or a checkpoint's or run's folder.
        overwrite: Allow a folder that holds another run. Nothing of it is deleted here: see ``clear_run``.

    Yields:
        The checkpoint to go on from; ``None`` to start at the beginning.

    Raises:
        CheckpointError: The folder holds another run, or a model; another process is using it; there is nothing to
            resume; or it cannot be written.
    """
    output_dir = Path(output_dir)
    checkpoint = _check(output_dir, resume, overwrite)
    with locked(output_dir):
        yield checkpoint


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Make a folder where it is missing, and keep other processes out of it for the length of a ``with`` block.

    Raises:
        CheckpointError: Another process is in it, or it cannot be written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / _LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"another process is training in {output_dir}; wait for it, or choose another") from error
    except OSError as error:
        raise CheckpointError(f"cannot write in {output_dir}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _check(output_dir: Path, resume: str | bool, overwrite: bool) -> Path | None:
    """What to resume from; an error where the folder is not free to use. Changes nothing."""
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"{output_dir} is a file; output_dir is a folder")
    if (output_dir / "config.json").exists():
        raise CheckpointError(f"{output_dir} holds a model; choose another output_dir")
    foreign = [path.name for path in output_dir.glob("checkpoint-*") if _is_foreign(path)]
    if foreign:
        raise CheckpointError(
            f"{output_dir} holds {', '.join(sorted(foreign))}, which lorafleet did not write; choose another output_dir"
        )
    if resume is True and overwrite:
        raise CheckpointError("resume_from_checkpoint and overwrite contradict each other; give one of them")
    has_run = any((output_dir / mark).exists() for mark in _MARKS) or newest_checkpoint(output_dir) is not None
    if resume is True:
        return _own_checkpoint(output_dir, has_run)
    checkpoint = _named_checkpoint(Path(resume)) if resume else None
    inside = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    if has_run and not overwrite and not inside:
        raise CheckpointError(
            f"{output_dir} holds another run; give --resume-from-checkpoint to go on with it, "
            "--overwrite to replace it, or another --output-dir"
        )
    others = [name for name in _OWN if (output_dir / name).exists()]
    if others and not has_run and not overwrite:
        raise CheckpointError(
            f"{output_dir} holds {', '.join(others)}, which a run would replace; give another --output-dir, "
            "or --overwrite if they may go"
        )
    return checkpoint


def _is_foreign(path: Path) -> bool:
    """Whether a folder named like a checkpoint is another tool's, whose place a checkpoint of this run could take."""
    return path.is_dir() and any(path.iterdir()) and not (path / CHECKPOINT_MANIFEST).exists()


def _own_checkpoint(output_dir: Path, has_run: bool) -> Path | None:
    checkpoint = newest_checkpoint(output_dir)
    if checkpoint is None and not has_run:
        raise CheckpointError(f"there is no run to resume in {output_dir}; start one without resume_from_checkpoint")
    if checkpoint is None and any((output_dir / name).exists() for name in (CONFIG, METHOD, RESULT)):
        raise CheckpointError(
            f"the run in {output_dir} is finished and has no checkpoint to go on from; "
            "--overwrite trains anew in its place"
        )
    if checkpoint is None:
        logger.info("the run in %s stopped before its first checkpoint; starting at the beginning", output_dir)
    return checkpoint


def _named_checkpoint(path: Path) -> Path:
    newest = newest_checkpoint(path)
    if newest is not None:
        return newest
    if not path.is_dir():
        near = newest_checkpoint(path.parent)
        hint = f"; the newest in {path.parent} is {near.name}" if near else ""
        raise CheckpointError(f"there is no checkpoint at {path}{hint}")
    load_checkpoint(path)  # raises where it is damaged or was never finished
    return path


def clear_run(output_dir: Path, keep: Path | None = None) -> None:
    """Delete what a run left: adapter, logs, checkpoints but ``keep``. Whatever else is in the folder is the user's."""
    kept = keep.resolve() if keep else None
    for name in _OWN:
        (output_dir / name).unlink(missing_ok=True)
    folders = [*output_dir.glob("checkpoint-*"), *output_dir.glob(".checkpoint-*"), output_dir / "tensorboard"]
    for pattern, mark in (
        ("trials/*", MANIFEST),
        ("adapters/*", MANIFEST),
        ("combined/*", MANIFEST),
        ("best", MANIFEST),
        ("workers/*", METRICS),
        ("model", MANIFEST),
    ):
        folders += [path.parent for path in output_dir.glob(f"{pattern}/{mark}")]
    for folder in folders:
        if folder.is_dir() and folder.resolve() != kept:
            shutil.rmtree(folder)


def provenance() -> dict[str, Any]:
    """What made a result: versions of lorafleet, Python and packages, the platform, and the source's git commit."""
    return {
        "lorafleet": lorafleet.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that lorafleet runs from, ``+changes`` where files differ; none when installed."""
    source = Path(__file__).parent
    if shutil.which("git") is None or _git(source, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(source, "rev-parse", "HEAD")
    changed = _git(source, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else None


def model_card(
    *,
    title: str,
    base_name: str,
    shape: Mapping[str, object],
    data: str,
    metrics_before: Mapping[str, float],
    metrics: Mapping[str, float],
    facts: Mapping[str, object],
    made_by: Mapping[str, Any],
    kind: str = "lora",
) -> str:
    """Write the README of an adapter, with measured numbers only.

    Args:
        title: Usually the run folder's name.
        base_name: The base's hub id, path or alias. Of a path only the last part is told.
        shape: What trained, as rows for the table of facts; see :func:`lora_shape`.
        data: What it was trained on, in words.
        metrics_before: The base's held-out numbers, by name.
        metrics: The adapter's, under the same names.
        facts: More rows for the table of facts, in this order, such as steps, tokens, seconds.
        made_by: ``provenance()``.
        kind: The method that trained it.

    Returns:
        Markdown with the hub's YAML front matter.
    """
    base = Path(base_name).name if Path(base_name).is_absolute() else base_name
    front = {
        "base_model": base,
        "library_name": {"full": "transformers", **dict.fromkeys(("bottleneck", "bitfit"), "lorafleet")}.get(
            kind, "peft"
        ),
        "pipeline_tag": "text-generation",
        "tags": [kind, "lorafleet", f"base_model:{'finetune' if kind == 'full' else 'adapter'}:{base}"],
    }
    rows = {"base": base, "data": data, **shape, **facts}
    names = [*dict.fromkeys([*metrics_before, *metrics])]
    held_out = [[name, _number(metrics_before.get(name)), _number(metrics.get(name))] for name in names]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {markdown_cell(title)}",
        f"{_WHAT.get(kind, f'A {kind} adapter for')} `{base}`, trained with lorafleet {made_by['lorafleet']}.",
        "## Held-out results\n\n" + markdown_table(["", "base", kind], held_out) if held_out else "",
        "## What it is\n\n" + markdown_table(["", ""], [[name, _number(value)] for name, value in rows.items()]),
        "## Use it\n\n" + _use(kind, base),
        f"Python {made_by['python']}, " + ", ".join(f"{k} {v}" for k, v in made_by["packages"].items() if v) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def lora_shape(lora: LoraConfig) -> dict[str, object]:
    """What a LoRA adapter is, as rows of a model card."""
    scale = lora.scaling(lora.r, lora.lora_alpha)
    shape: dict[str, object] = {"r": lora.r, "lora_alpha": f"{lora.lora_alpha:g}", "effective scale": f"{scale:g}"}
    if lora.takes_off_start:
        shape |= {"start": lora.init_lora_weights, "saved as": f"plain LoRA of rank {lora.as_plain().r}"}
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return shape | {"target_modules": targets}


_WHAT = {"lora": "A LoRA adapter for", "full": "All weights of"}


def _use(kind: str, base: str) -> str:
    if kind == "full":
        return '`lorafleet generate --model path/to/this/folder/model --prompt "..."`'
    ours = '`lorafleet generate --adapter path/to/this/folder --prompt "..."`'
    return ours if kind in ("bottleneck", "bitfit") else f"{_USE_PEFT.format(base=base)}\n\nOr: {ours}"


_USE_PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")
```"""


def _number(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
