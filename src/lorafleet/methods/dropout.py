"""Dropout of torch's own layers that follows from a routing's keys, so that a resumed run draws it again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorafleet.lora import Routing
from lorafleet.lora.layer import mix_key


@contextmanager
def seeded_by(routing: Routing, device: torch.device) -> Iterator[None]:
    """Within a ``with`` block torch's generators follow from the routing's keys; without keys they run on."""
    if routing.dropout_keys is None:
        yield
        return
    seed = 0
    for key in routing.dropout_keys:
        seed = mix_key(seed, key)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
