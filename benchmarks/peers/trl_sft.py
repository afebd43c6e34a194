"""TRL's ``SFTTrainer`` at the settings that were fastest for it on a CPU."""

import tempfile

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.job import Job, Result, serve
from benchmarks.peers.trainer_parts import StepClock, adapted_model, common_arguments

# Measured on one thread, on rows of 40 to 160 tokens: eager attention is 1 to 3 % faster than sdpa, padding_free 9 to
# 19 % slower than padding (same loss; TRL supports it with flash attention only), torch_compile 3 to 8 % faster after a
# first step of minutes. The loss in chunks is TRL's only one; on a CPU it scores the prompt's tokens too.
ATTENTION = "eager"
SETTINGS = (
    "length-grouped batches, no packing, no gradient checkpointing, fp32 (its defaults are checkpointing and bf16), "
    "chunked loss, padded, eager attention, fused AdamW"
)


def run(job: Job) -> Result:
    """Train as the job says."""
    model = adapted_model(job, attn_implementation=ATTENTION)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **common_arguments(job, folder),
                packing=False,
                max_length=None,
                gradient_checkpointing=False,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list(job.rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        clock.count(trainer)
        trainer.train()
    return clock.result(SETTINGS, "trl")


if __name__ == "__main__":
    serve(run)
