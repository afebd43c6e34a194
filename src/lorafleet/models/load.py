"""Load a base model and its tokenizer: frozen, hashed, in the asked precision, on the asked device."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorafleet.config.model import ModelConfig
from lorafleet.errors import ModelError, raise_all
from lorafleet.models.digest import tokenizer_hash, weight_files, weights_hash
from lorafleet.models.gguf import check_gguf, load_gguf_model, load_gguf_tokenizer, quiet_transformers
from lorafleet.models.machine import pick_device, pick_dtype
from lorafleet.models.source import Source, find_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer.

    Attributes:
        model: In ``eval()``, no parameter requires a gradient.
        tokenizer: With a pad token; the end-of-text token stands in where the model has none.
        name: What an adapter records as its base: ``smollm2-135m``, a hub id, or an absolute path.
        source: The folder, GGUF file or hub id that was loaded.
        revision: The commit of a hub model.
        device: Where the model is.
        dtype: The precision of its weights.
        weights_hash: Changes with any byte of the weights or of ``config.json``.
        tokenizer_hash: Changes with the vocabulary, the special tokens or the chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    weights_hash: str
    tokenizer_hash: str

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """What transformers saves of the tokenizer, by path: for hundreds of adapters, made into text once."""
        with TemporaryDirectory(prefix="lorafleet-tokenizer-") as folder:
            self.tokenizer.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def load_base(config: ModelConfig) -> Base:
    """Load the base model that ``config`` names.

    Only safetensors and GGUF weights are read, never pickled ones.

    Raises:
        ConfigError: No model is named; the device or precision does not exist here.
        ModelError: The model cannot be found or read, lacks weights, or has fewer embeddings than its tokenizer.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    source = find_source(config)
    logger.info("loading %s in %s on %s", source.name, str(dtype).removeprefix("torch."), device)
    tokenizer = _read_tokenizer(source, config)
    if source.gguf_file is None:
        model = _read_model(source, config, dtype, device)
        revision: str | None = getattr(model.config, "_commit_hash", None) or source.revision
        files = _model_files(source, revision)
    else:
        path = Path(source.path)
        model, revision, files = load_gguf_model(path, dtype), None, [path]
    if device.type == "cuda":
        # cuDNN plans attention anew for each shape, and every batch has another: 0.1 to 2 s a step, against 0.03 s.
        torch.backends.cuda.enable_cudnn_sdp(False)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method and loses its type
    model.eval().requires_grad_(False)
    _check_vocabulary(model, tokenizer, source)
    return Base(
        model=model,
        tokenizer=tokenizer,
        name=source.name,
        source=source.path,
        revision=revision,
        device=device,
        dtype=dtype,
        weights_hash=weights_hash(files),
        tokenizer_hash=tokenizer_hash(tokenizer),
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that ``config`` names; its pad token is set.

    Raises:
        ConfigError: No model is named.
        ModelError: The tokenizer cannot be found or read.
    """
    return _read_tokenizer(find_source(config), config)


def load_meta_model(config: ModelConfig) -> nn.Module:
    """Build the model from its configuration alone, on the meta device: shapes without memory.

    Raises:
        ConfigError: No model is named.
        ModelError: The configuration cannot be found or read, or is no causal language model's.
    """
    source = find_source(config)
    with _collector_paused():
        return _build_meta_model(source, config)


def _build_meta_model(source: Source, config: ModelConfig) -> nn.Module:
    model_config = read_config(source, config)
    with _load_errors(source), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    return model.eval()


def read_config(source: Source, config: ModelConfig) -> PreTrainedConfig:
    """Read the model's configuration, from ``config.json`` or a GGUF file's header."""
    extra = {}
    if source.gguf_file is not None:
        check_gguf(Path(source.path))
        extra["gguf_file"] = source.gguf_file
    with _load_errors(source):
        read: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=config.trust_remote_code, **extra
        )
    return read


def _read_tokenizer(source: Source, config: ModelConfig) -> PreTrainedTokenizerBase:
    if source.gguf_file is not None:
        tokenizer = load_gguf_tokenizer(Path(source.path))
    else:
        with _load_errors(source):
            tokenizer = AutoTokenizer.from_pretrained(
                source.location, revision=source.revision, trust_remote_code=config.trust_remote_code
            )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source.path} has no end-of-text token, so generation could never stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model(source: Source, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    _check_weights(source)
    placement = {} if device.type == "cpu" else {"device_map": {"": str(device)}}
    with _load_errors(source), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **placement,
        )
    model: PreTrainedModel
    info: dict[str, set[str]]
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{source.path} holds an adapter; pass it as the adapter, and its base as the model")
    faults = [f"no weights for {name}" for name in sorted(info["missing_keys"])]
    raise_all(ModelError, faults, f"{source.path} is incomplete")
    if info["unexpected_keys"]:
        logger.info(
            "%s: weights that the model does not use: %s", source.path, ", ".join(sorted(info["unexpected_keys"]))
        )
    return model


def _check_weights(source: Source) -> None:
    """Refuse a local folder without safetensors, or with an adapter beside the model, before anything is read."""
    if not source.is_local:
        return
    folder = Path(source.location)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds a model and an adapter; move adapter_config.json out to use the model alone")
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has pickled weights only ({', '.join(pickled)}), which can run code when read. If you trust "
            "them, load the model once with transformers and save_pretrained it: that writes safetensors"
        )
    weight_files(folder)


def _model_files(source: Source, revision: str | None) -> list[Path]:
    """The weight files and ``config.json`` that were loaded; those of a hub model lie in the hub's cache."""
    folder = Path(source.location)
    if not source.is_local:
        found = try_to_load_from_cache(source.location, "config.json", revision=revision)
        if not isinstance(found, str):
            raise ModelError(f"{source.name} was loaded, but its files are not in the hub's cache")
        folder = Path(found).parent
    return [*weight_files(folder), folder / "config.json"]


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"{source.path}: the tokenizer knows {len(tokenizer)} tokens, the model only {rows}; "
            "resize the model's embeddings and save it, or use the tokenizer that belongs to it"
        )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector: nearly all that importing a model's code makes stays, so scanning it is waste."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def _load_errors(source: Source) -> Iterator[None]:
    """Turn the errors of loading into a ModelError that names the model and the remedy."""
    try:
        yield
    except Exception as error:  # a config can make transformers raise nearly anything
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"cannot load {source.path}: {_remedy(reason)}") from error


def _remedy(reason: str) -> str:
    if "trust_remote_code" in reason:
        return "it comes with its own Python code; read that code, then allow it with --trust-remote-code"
    if "safetensors" in reason and "bin" in reason:
        return f"{reason}\nIt may have pickled weights only; choose a revision with safetensors"
    return reason
