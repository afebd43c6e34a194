"""A whole model's folder, which is there complete or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from lorafleet.errors import AdapterError
from lorafleet.files.atomic import sync_folder
from lorafleet.models.gguf import quiet_transformers


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer as any tool that loads Hugging Face models wants them."""
    _settle_generation_config(model)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _settle_generation_config(model: PreTrainedModel) -> None:
    """Sampling settings without ``do_sample``, which some models carry, would make transformers refuse to save."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


@contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A temporary folder beside ``output_dir``; takes its place when the ``with`` block ends well, else vanishes."""
    output_dir = output_dir.absolute()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary, old = (output_dir.with_name(f".{output_dir.name}.{token}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if output_dir.exists():
            os.replace(output_dir, old)
        try:
            os.replace(temporary, output_dir)
        except OSError:
            if old.exists():
                os.replace(old, output_dir)
            raise
        sync_folder(output_dir.parent)
    except BaseException as error:
        shutil.rmtree(temporary)
        if isinstance(error, OSError | SafetensorError):
            raise AdapterError(f"cannot write the model to {output_dir}: {error}") from error
        raise
    if old.exists():
        shutil.rmtree(old)


def sync_tree(folder: Path) -> None:
    """Flush what transformers wrote to disk, so that the rename does not come before the contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(folder)
