"""The plain loop over users: PEFT and ``transformers.Trainer`` for each, one after another, on one loaded base."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.job import peak_memory_bytes, serve_plain
from benchmarks.peers.trainer_parts import plain_trainer


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train and save every user's adapter; seconds of each, from the fresh adapter to its files."""
    torch.set_num_threads(job["threads"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    seconds, disk = [], []
    for rows in job["users"]:
        start = time.perf_counter()
        model = get_peft_model(base, LoraConfig(**job["lora"], target_modules="all-linear", task_type="CAUSAL_LM"))
        with tempfile.TemporaryDirectory() as folder:
            trainer = plain_trainer(model, tokenizer, job, folder, train_dataset=Dataset.from_list(rows))
            trainer.train()
            trainer.save_model(folder)
            seconds.append(time.perf_counter() - start)
            disk.append(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()))
        base = model.unload()
    return {"seconds": seconds, "disk_bytes": disk, "peak_memory_bytes": peak_memory_bytes()}


if __name__ == "__main__":
    serve_plain(run)
