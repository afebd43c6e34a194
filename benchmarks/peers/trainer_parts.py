"""What the two peers built on transformers' Trainer share: the model, and the clock that reads each step."""

import time
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from benchmarks.job import Job, Result, package_versions, peak_memory_bytes


def adapted_model(job: Job, **options: Any) -> PeftModel:
    """The base with the adapter that every peer starts from, trainable."""
    torch.set_num_threads(job.threads)
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(base, job.adapter, is_trainable=True)


def common_arguments(job: Job, folder: str) -> dict[str, Any]:
    """Training arguments that are the same for both, and the same as lorafleet's."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.batch_size,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": job.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": job.seed,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        # Every loss in parity; in throughput no more than the end, so that logging costs nothing.
        "logging_steps": 1 if job.phase == "parity" else job.steps,
    }


def plain_trainer(model: Any, tokenizer: Any, job: dict[str, Any], folder: str, **rows: Dataset) -> Trainer:
    """``transformers.Trainer`` with its defaults, and the job's steps, batch, rate, warm-up and seed."""
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=job.get("batch_size", 8),
        per_device_eval_batch_size=16,
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        warmup_steps=job["warmup_steps"],
        lr_scheduler_type="linear",
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=job["steps"],
    )
    return Trainer(model=model, args=arguments, data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), **rows)


class StepClock(TrainerCallback):
    """Reads time and loss of every step, and counts real tokens where the batches are made."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self._last = 0.0

    def count(self, trainer: Any) -> None:
        """Count the tokens of each batch in front of the trainer's own collator."""
        collate = trainer.data_collator

        def counted(features: list[dict[str, Any]]) -> Any:
            self.tokens.append(sum(len(feature["input_ids"]) for feature in features))
            return collate(features)

        trainer.data_collator = counted

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, *_: Any, **given: Any) -> None:
        if "loss" in given["logs"]:
            self.losses.append(float(given["logs"]["loss"]))

    def result(self, settings: str, *packages: str) -> Result:
        """What was read; batches that were made ahead and not trained are not counted."""
        return Result(
            losses=self.losses,
            seconds=self.seconds,
            tokens=self.tokens[: len(self.seconds)],
            peak_memory_bytes=peak_memory_bytes(),
            settings=settings,
            versions=package_versions("torch", "transformers", "peft", "accelerate", *packages),
        )
