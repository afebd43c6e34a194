"""The adapter pool on the job of ``benchmarks.switch``: mixed decoding, switches, loading, many adapters."""

import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.job import serve_plain
from lorafleet.config import ModelConfig
from lorafleet.files.adapter import WEIGHTS
from lorafleet.generation.request import Request
from lorafleet.models.load import load_base
from lorafleet.serving.pool import AdapterPool

PAIRS = 15
"""Of loads and plain reads."""

SWITCHES = 102
"""Single first tokens differ by a tenth, and a hundredth is asked for."""


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that the job asks of this way."""
    torch.set_num_threads(job["threads"])
    base = load_base(ModelConfig(model_name_or_path=job["model"], device=job["device"], dtype=job["dtype"]))
    size = {"max_adapters": job["resident"], "max_requests": max(batch for _, batch in job["cases"])}
    pool = AdapterPool(base, registry=job["registry"], check_base=False, **size)
    empty = _held_bytes(base.device)  # before the first adapter
    found = {"decode": [_decode(pool, job, adapters, batch) for adapters, batch in job["cases"]]}
    return found | {"load": _load(pool, job), "switch": _switch(pool, job), "many": _many(pool, job, empty)}


def _decode(pool: AdapterPool, job: dict[str, Any], adapters: int, batch: int) -> dict[str, Any]:
    """Tokens a second after the first of each row, and what they are."""
    names = [job["adapters"][i % adapters] if adapters else "base" for i in range(batch)]
    prompts = job["prompts"][:batch]
    _answer(pool, prompts, names, 2)  # whatever is made ready at the first call
    first, _ = _answer(pool, prompts, names, 1)
    whole, tokens = _answer(pool, prompts, names, job["new_tokens"])
    return {"rate": batch * (job["new_tokens"] - 1) / (whole - first), "tokens": tokens}


def _answer(pool: AdapterPool, prompts: list[list[int]], names: list[str], count: int) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of answers of ``count`` tokens, whatever the model would have ended with."""
    tickets = [pool.submit("x", name, max_new_tokens=count) for name in names]
    for number, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
        request = ticket.request
        # Ids in place of text, no end, and nothing of an earlier answer to go on from.
        owner = (number, time.perf_counter())
        ticket.request = Request(prompt, request.slot, request.config, 0, frozenset(), owner=owner)
    start = time.perf_counter()
    while not all(ticket.done for ticket in tickets):
        pool.step()
    return time.perf_counter() - start, [ticket.request.answer for ticket in tickets]


def _load(pool: AdapterPool, job: dict[str, Any]) -> dict[str, float]:
    """An adapter from disk into its slot against a plain read of its tensors, in turn; both from the page cache."""
    whole, raw = [], []
    for number in range(PAIRS):
        name = job["adapters"][number % len(job["adapters"])]
        found = pool.source.find(name)
        for resident in pool.residents:
            pool.evict(resident.label)
        start = time.perf_counter()
        pool.activate(name)
        _wait(pool.base.device)
        middle = time.perf_counter()
        load_file(Path(found.folder) / WEIGHTS, device=job["device"])
        _wait(pool.base.device)
        whole.append(middle - start)
        raw.append(time.perf_counter() - middle)
    pool.disable()
    return {"seconds": median(whole), "raw_seconds": median(raw)}


def _switch(pool: AdapterPool, job: dict[str, Any]) -> float:
    """The first token by another resident adapter than the request before, over one by the same, in turn."""
    prompt = job["prompts"][:1]
    ratios = list[float]()
    for number in range(SWITCHES):
        name = job["adapters"][number % 2]
        switch, stay = (_answer(pool, prompt, [name], 1)[0] for _ in range(2))
        ratios.append(switch / stay)
    return median(ratios[2:])  # both are ready then


def _many(pool: AdapterPool, job: dict[str, Any], empty: int) -> dict[str, Any]:
    """First tokens of requests over all names of the registry, some resident, some not, from the call on."""
    picks, there, absent = random.Random(0), list[float](), list[float]()
    for _ in range(job["requests"]):
        name = f"many-{int(picks.paretovariate(0.5)) % job['registered']}"
        known = any(resident.label == f"{name}:1" for resident in pool.residents)
        start = time.perf_counter()
        _answer(pool, job["prompts"][:1], [name], 1)
        (there if known else absent).append(time.perf_counter() - start)
    return {
        "resident": len(pool.residents),
        "resident_bytes": sum(resident.bytes for resident in pool.residents),
        "added_bytes": _held_bytes(pool.base.device) - empty,
        "hits": len(there),
        "misses": len(absent),
        "hit_seconds": median(there) if there else None,
        "miss_seconds": median(absent) if absent else None,
    }


def _held_bytes(device: torch.device) -> int:
    """Memory in use where the adapters lie."""
    held: int = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    serve_plain(run)
