"""Full fine-tuning in a plain ``transformers.Trainer``, at several learning rates, each from the base anew."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.job import IGNORED, serve_plain
from benchmarks.peers.trainer_parts import plain_trainer


def run(job: dict[str, Any]) -> list[float]:
    """Train at every rate; return the held-out losses: means over all supervised tokens, in nats."""
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows, losses = Dataset.from_list(job["rows"]), []
    for rate in job["rates"]:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            trainer = plain_trainer(model, tokenizer, job | {"learning_rate": rate}, folder, train_dataset=rows)
            trainer.args.train_sampling_strategy = "sequential"  # the rows come in the order of lorafleet's steps
            trainer.train()
        losses.append(_held_out_loss(model.eval(), job["eval_rows"]))
    return losses


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, rows: list[dict[str, list[int]]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        targets = int((labels[:, 1:] != IGNORED).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * targets
        count += targets
    return total / count


if __name__ == "__main__":
    serve_plain(run)
