"""lorafleet on the cases of ``benchmarks.population``: K adapters together, or the same K one after another."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.job import IGNORED, serve_plain
from benchmarks.peers.lorafleet_loop import LabelledRow
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.adapter import Adapter, load_adapter
from lorafleet.lora import LoraBank
from lorafleet.models.load import load_base
from lorafleet.models.machine import keep_large_allocations
from lorafleet.training.events import Event, StepDone
from lorafleet.training.loop import Population
from lorafleet.training.member import Member


class InOrder:
    """One row a step, in their order."""

    def __init__(self, rows: int) -> None:
        self.steps_per_epoch = rows

    def window(self, step: int) -> list[list[int]]:
        """The row of a step."""
        return [[step]]


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Train every case; return the seconds of its timed steps and the last loss of each adapter."""
    torch.set_num_threads(job["threads"])
    keep_large_allocations()
    base = load_base(ModelConfig(model_name_or_path=job["model"], device="cpu", dtype="float32"))
    adapter = load_adapter(Path(job["adapter"]))
    adapters = len(job["cases"][0]["rows"])
    # One after another needs one slot: more would be more to keep gradients for.
    bank = LoraBank(base.model, adapters if job["together"] else 1)
    bank.reserve([adapter.config])
    loss_model = LossModel(base.model, bank, base.tokenizer.pad_token_id)
    loss_model.speed_up()
    found = []
    for case in job["cases"]:
        groups = [case["rows"]] if job["together"] else [[rows] for rows in case["rows"]]
        timed = [_train(_members(bank, adapter, group, job), loss_model, bank, job["skipped"]) for group in groups]
        found.append(
            {
                "seconds": sum(seconds for seconds, _ in timed),
                "losses": [loss for _, losses in timed for loss in losses],
            }
        )
    return found


def _members(
    bank: LoraBank, adapter: Adapter, rows: list[list[dict[str, list[int]]]], job: dict[str, Any]
) -> list[Member]:
    """Fresh adapters in the first slots, in the place of those that were there."""
    for slot in range(len(rows)):
        if bank.configs[slot] is not None:
            bank.remove(slot)
        bank.add(adapter.config, slot=slot)
        bank.load_state_dict(slot, adapter.tensors)
    return [_member(bank, slot, own, job) for slot, own in enumerate(rows)]


def _member(bank: LoraBank, slot: int, rows: list[dict[str, list[int]]], job: dict[str, Any]) -> Member:
    training = TrainingConfig(
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=1,
        max_steps=len(rows),
    )
    labelled = [
        LabelledRow(np.array(row["input_ids"], dtype=np.int32), np.array(row["labels"]) != IGNORED) for row in rows
    ]
    member = Member(f"adapter {slot}", bank, slot, training, labelled)
    member.schedule = InOrder(len(rows))  # type: ignore[assignment]
    return member


def _train(members: list[Member], loss_model: LossModel, bank: LoraBank, skipped: int) -> tuple[float, list[float]]:
    """Seconds from the end of the last skipped step to the end, and each member's last loss."""
    losses, ends = dict[str, float](), dict[int, float]()

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            losses[event.name], ends[event.step] = event.loss, time.perf_counter()

    options = RunConfig(output_dir="unused", save_strategy="no")
    Population(members, loss_model, bank, options, observers=[note]).train()
    return max(ends.values()) - ends[skipped], [losses[member.name] for member in members]


if __name__ == "__main__":
    serve_plain(run)
