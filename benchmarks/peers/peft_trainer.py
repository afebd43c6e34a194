"""PEFT and ``transformers.Trainer``, as its documentation shows them: its defaults, a padding collator."""

import tempfile

from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.job import Job, Result, serve
from benchmarks.peers.trainer_parts import StepClock, adapted_model, common_arguments

SETTINGS = "defaults: random sampler, batches padded to the longest row, sdpa attention, fused AdamW"


def run(job: Job) -> Result:
    """Train as the job says."""
    model = adapted_model(job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                **common_arguments(job, folder),
                train_sampling_strategy="sequential" if job.phase == "parity" else "random",
            ),
            train_dataset=Dataset.from_list(job.rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[clock],
        )
        clock.count(trainer)
        trainer.train()
    return clock.result(SETTINGS)


if __name__ == "__main__":
    serve(run)
