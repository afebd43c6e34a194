"""GGUF files as base models: unpacked to full precision by transformers."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lorafleet.errors import MissingExtraError, ModelError

logger = logging.getLogger(__name__)

# Values of tokenizer.ggml.pre whose rule is: every digit alone, then GPT-2's rule. Transformers reads GPT-2's only,
# which cuts "a  3" into other tokens than the model was trained on.
_DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})

_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


def check_gguf(path: Path) -> None:
    """Refuse what is no GGUF file before a reader trusts its lengths.

    Raises:
        MissingExtraError: The package ``gguf`` is not installed.
        ModelError: The file has no GGUF header, or one that promises more than the file holds.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError(f"reading {path}", "demo")
    with path.open("rb") as file:
        head = file.read(24)
    version, tensors, fields = (int.from_bytes(head[a:b], "little") for a, b in ((4, 8), (8, 16), (16, 24)))
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it does not start with the GGUF header")
    if version not in (2, 3):
        raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 can be read; convert the model again")
    if (tensors + fields) * 12 > path.stat().st_size:  # a field takes 12 bytes at least
        raise ModelError(f"{path} is damaged: its header promises {tensors} tensors and {fields} fields")


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file carries, chat template included."""
    check_gguf(path)
    with _read_errors(path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        fields = _tokenizer_fields(path)
        if fields["pre"] in _DIGITS_ALONE:
            backend = tokenizer.backend_tokenizer
            backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        # Transformers 5.17 takes the token of the beginning for that of the end, and none for padding.
        given = {role: fields[name] for role, name in _ROLES.items() if fields[name] is not None}
        tokens = {role: tokenizer.convert_ids_to_tokens(number) for role, number in given.items()}
        amended: dict[str, Any] = {
            r: token for r, token in tokens.items() if token not in (None, getattr(tokenizer, r))
        }
        if amended:
            tokenizer.add_special_tokens(amended)
    return tokenizer


def _tokenizer_fields(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer; none where it says nothing."""
    from gguf import GGUFReader  # an extra

    reader = GGUFReader(path)
    fields = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in ("pre", *_ROLES.values())}
    return {name: field and field.contents() for name, field in fields.items()}


def load_gguf_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, every weight unpacked to ``dtype``; on the CPU.

    Raises:
        ModelError: The file is damaged, or its architecture is one that transformers cannot unpack.
    """
    check_gguf(path)
    # Newer releases of transformers keep weights packed where they can; packed layers cannot be adapted or saved.
    unpack = getattr(transformers, "GgufConfig", None)
    extra: dict[str, Any] = {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    with _read_errors(path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, **extra
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)  # it is an ordinary model now, and may be saved as one
    return model


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model (float32) and tokenizer as a Hugging Face folder, flushed to disk.

    Args:
        path: The GGUF file.
        folder: Where to write; created here.
    """
    tokenizer = load_gguf_tokenizer(path)
    model = load_gguf_model(path, torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.mkdir(parents=True)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for entry in [*folder.iterdir(), folder]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars, which would interleave with ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into a ModelError that names the file."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # the readers index into the file without checks: any exception may mean damage
        raise ModelError(f"cannot read the GGUF file {path}: {type(error).__name__}: {error}") from error
