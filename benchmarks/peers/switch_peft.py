"""PEFT's ``adapter_names`` and transformers' plain ``generate`` on the job of ``benchmarks.switch``."""

import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.job import serve_plain


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The same prompts in the same batches; base alone is the model before PEFT touches it."""
    torch.set_num_threads(job["threads"])
    base = (
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(job["device"]).eval()
    )
    base.generation_config = GenerationConfig()  # no token of the model's own ends an answer
    found = {case: _decode(base, job, *case) for case in map(tuple, job["cases"]) if not case[0]}
    model = PeftModel.from_pretrained(base, job["adapters"][0], adapter_name="a0")
    for number, folder in enumerate(job["adapters"][1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
    model.eval()
    found |= {case: _decode(model, job, *case) for case in map(tuple, job["cases"]) if case[0]}
    return {"decode": [found[case] for case in map(tuple, job["cases"])]}


def _decode(model: Any, job: dict[str, Any], adapters: int, batch: int) -> dict[str, Any]:
    names = {"adapter_names": [f"a{i % adapters}" for i in range(batch)]} if adapters else {}
    ids = torch.tensor(job["prompts"][:batch], device=job["device"])
    _answer(model, ids, names, 2)
    first, _ = _answer(model, ids, names, 1)
    whole, tokens = _answer(model, ids, names, job["new_tokens"])
    return {"rate": batch * (job["new_tokens"] - 1) / (whole - first), "tokens": tokens}


@torch.no_grad()
def _answer(model: Any, ids: torch.Tensor, names: dict[str, Any], count: int) -> tuple[float, list[list[int]]]:
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, **names)
    tokens = found[:, ids.shape[1] :].tolist()  # waits for a GPU
    return time.perf_counter() - start, tokens


if __name__ == "__main__":
    serve_plain(run)
