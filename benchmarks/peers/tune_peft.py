"""The plain loop over settings: PEFT and ``transformers.Trainer`` for each, one after another, on one loaded base."""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.job import serve_plain
from benchmarks.peers.trainer_parts import plain_trainer


def run(job: dict[str, Any]) -> list[dict[str, float]]:
    """Train and evaluate every setting; return its seconds, from the fresh adapter to the held-out loss."""
    torch.set_num_threads(job["threads"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    train, held_out = Dataset.from_list(job["rows"]), Dataset.from_list(job["eval_rows"])
    found = []
    for setting in job["settings"]:
        start = time.perf_counter()
        config = LoraConfig(**setting, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        with tempfile.TemporaryDirectory() as folder:
            trainer = plain_trainer(model, tokenizer, job, folder, train_dataset=train, eval_dataset=held_out)
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
        found.append({"seconds": time.perf_counter() - start, "loss": float(loss)})
        base = model.unload()
    return found


if __name__ == "__main__":
    serve_plain(run)
