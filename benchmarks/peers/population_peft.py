"""PEFT and ``transformers.Trainer`` on the cases of ``benchmarks.population``: one adapter after another."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.job import serve_plain
from benchmarks.peers.trainer_parts import StepClock


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Train every case; the base is loaded once, and each adapter is taken off it before the next."""
    torch.set_num_threads(job["threads"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    found = []
    for case in job["cases"]:
        seconds, losses = 0.0, []
        for rows in case["rows"]:
            model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
            clock = _train(model, tokenizer, rows, job)
            seconds += sum(clock.seconds[job["skipped"] :])
            losses.append(clock.losses[-1])
            base = model.unload()
        found.append({"seconds": seconds, "losses": losses})
    return found


def _train(model: PeftModel, tokenizer: Any, rows: list[dict[str, list[int]]], job: dict[str, Any]) -> StepClock:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=len(rows),
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[clock],
        )
        trainer.train()
    return clock


if __name__ == "__main__":
    serve_plain(run)
