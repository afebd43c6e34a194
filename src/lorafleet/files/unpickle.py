"""``python unpickle.py FROM TO``: an adapter's tensors of a pickled file as safetensors, in a process of its own.

The only place that unpickles. ``weights_only`` lets nothing but tensors and plain containers be built, and whatever
would get past it is in a process that holds nothing. It is run by its path and imports nothing of lorafleet: the
process needs no search path of the caller's.
"""

import json
import pickle
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_NESTED = ("state_dict", "model_state_dict", "model", "module")
_MAX_LEVELS = 8  # a mapping can hold itself
_MAX_GROWTH = 4  # tied tensors share memory in the file and are written apart
_REMEDY = "where it was made, save it with model.save_pretrained(folder), which writes safetensors"


def main(source: str, target: str) -> int:
    """Convert, or say on stderr why not. JSON on stdin lists the names of modules that the adapter has whole."""
    whole = json.load(sys.stdin)
    try:
        found = _state_dict(torch.load(source, map_location="cpu", weights_only=True))
        kept = {name: tensor for name, tensor in found.items() if _may_be_adapters(name, whole)}
        _check_size(kept, Path(source).stat().st_size)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        print(_reason(error), file=sys.stderr)  # noqa: T201
        return 1
    left_out = json.dumps([name for name in found if name not in kept])
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}
    save_file(apart, target, {"left_out": left_out})
    return 0


def _state_dict(found: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors, which can stand inside others."""
    for _ in range(_MAX_LEVELS):
        if isinstance(found, Mapping):
            found = next((found[name] for name in _NESTED if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping) or not found or not all(isinstance(one, Tensor) for one in found.values()):
        raise ValueError("it holds no mapping of names to tensors")
    return {str(name): tensor for name, tensor in found.items()}


def _may_be_adapters(name: str, whole: Collection[str]) -> bool:
    """Whether a tensor can be the adapter's, which the caller decides: a whole base must not be written for it."""
    if "lora_" in name or ".modules_to_save." in name:
        return True
    named = name.endswith(".bias") or any(part in whole for part in name.split("."))
    return named and ".original_module." not in name


def _check_size(kept: Mapping[str, Tensor], file_bytes: int) -> None:
    """Refuse what a small file makes large: a tensor of stride 0 has any shape in a few bytes."""
    nbytes = sum(tensor.nbytes for tensor in kept.values())
    if nbytes > _MAX_GROWTH * file_bytes:
        raise ValueError(f"its tensors would take {nbytes} bytes, but the file has {file_bytes}; {_REMEDY}")


def _reason(error: Exception) -> str:
    """Why torch refused, in one line and without its advice to allow everything."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {found[1]!r}, and only tensors and plain containers are read; {_REMEDY}"
    if "weights_only" in text:
        found = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        detail = f" ({found[1]})" if found else ""
        return f"it is damaged, or holds more than tensors and plain containers{detail}; {_REMEDY}"
    return text.splitlines()[0] if text else "it is cut off; copy or download it again"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
