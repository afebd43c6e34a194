"""``python -m lorafleet.files.unpickle FROM TO``: tensors of a pickled file as safetensors, in a process of its own.

The only place that unpickles. ``weights_only`` lets nothing but tensors and plain containers be built, and whatever
would get past it is in a process that holds nothing.
"""

import pickle
import sys
from collections.abc import Mapping

import torch

from lorafleet.files.atomic import tensor_bytes, write_bytes

_NESTED = ("state_dict", "model_state_dict", "model", "module")


def main(source: str, target: str) -> int:
    """Convert, or say on stderr why not."""
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)  # noqa: T201
        return 1
    while isinstance(found, Mapping) and (inner := [name for name in _NESTED if isinstance(found.get(name), Mapping)]):
        found = found[inner[0]]
    if not isinstance(found, Mapping) or not found or not all(isinstance(one, torch.Tensor) for one in found.values()):
        print("it holds no mapping of names to tensors", file=sys.stderr)  # noqa: T201
        return 1
    write_bytes(target, tensor_bytes({str(name): tensor for name, tensor in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
