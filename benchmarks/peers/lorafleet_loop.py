"""lorafleet's own loop: a population of one, on token-flat batches."""

import ctypes
import gc
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.job import IGNORED, Job, Result, forget_peak, package_versions, peak_memory_bytes, serve
from benchmarks.matmul_peak import BatchShape, LinearShape, ModelShape, measure_need
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.data.batches import Part, collate, count_targets
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.adapter import load_adapter
from lorafleet.lora import BASE_ONLY, inject_lora
from lorafleet.models.load import load_base
from lorafleet.models.machine import keep_large_allocations
from lorafleet.training.events import Event, StepDone
from lorafleet.training.loop import Population
from lorafleet.training.member import Member

SETTINGS = "defaults: shuffled rows, token-flat batches without padding, what all rows begin with computed once"
MEASURED_SHAPES = 3


@dataclass(frozen=True)
class LabelledRow:
    """A row as the loop wants it, from ids and labels."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class FixedOrder:
    """Batches in a given order, in place of the loop's own shuffle."""

    batches: list[list[int]]

    @property
    def steps_per_epoch(self) -> int:
        """One pass over the batches."""
        return len(self.batches)

    def window(self, step: int) -> list[list[int]]:
        """The batch of one step."""
        return [self.batches[step]]


@dataclass
class StepClock:
    """Reads time, loss and tokens of every step."""

    last: float = 0.0
    result: Result = field(default_factory=Result)

    def __call__(self, event: Event) -> None:
        """Note a step that is done."""
        if isinstance(event, StepDone):
            now = time.perf_counter()
            self.result.seconds.append(now - self.last)
            self.result.losses.append(event.loss)
            self.result.tokens.append(event.tokens)
            self.last = now


def run(job: Job) -> Result:
    """Train as the job says; if it asks for it, time the matrix products right before and right after."""
    torch.set_num_threads(job.threads)
    keep_large_allocations()
    base = load_base(ModelConfig(model_name_or_path=job.model, device="cpu", dtype="float32"))
    adapter = load_adapter(Path(job.adapter))
    bank = inject_lora(base.model, adapter.config)
    bank.load_state_dict(0, adapter.tensors)
    member = Member("adapter", bank, 0, _training(job), [_row(row) for row in job.rows])
    if job.phase == "parity":
        member.schedule = FixedOrder(job.batches)  # type: ignore[assignment]
    loss_model = LossModel(base.model, bank, base.tokenizer.pad_token_id)
    loss_model.speed_up()
    loading_peak = peak_memory_bytes()
    clock = StepClock()
    if job.products:
        model, batches = _model_shape(loss_model, member), _batch_shapes(job, member)
        _measure_products(clock.result, "before", model, batches)
        _release_memory()
    options = RunConfig(output_dir="unused", save_strategy="no")
    population = Population([member], loss_model, bank, options, observers=[clock])
    clock.last = time.perf_counter()
    population.train()
    result = clock.result
    result.peak_memory_bytes = max(loading_peak, peak_memory_bytes())
    if job.products:
        # After the peak was read: a second graph beside the loop's would count as its memory.
        result.bare_seconds = [_bare_seconds(loss_model, member, step) for step in range(job.steps)]
        _measure_products(result, "after", model, batches)
    result.settings = SETTINGS
    result.versions = package_versions("torch", "transformers", "lorafleet")
    return result


def _training(job: Job) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=job.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=job.warmup_steps,
        per_device_train_batch_size=job.batch_size,
        max_steps=job.steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=job.seed,
    )


def _row(row: dict[str, list[int]]) -> LabelledRow:
    return LabelledRow(np.array(row["input_ids"], dtype=np.int32), np.array(row["labels"]) != IGNORED)


def _model_shape(loss_model: LossModel, member: Member) -> ModelShape:
    """Sizes of the model's products. Which inputs need a gradient is seen in one forward pass."""
    bank, needs_grad = member.bank, dict[str, bool]()
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: needs_grad.update({path: inputs[0].requires_grad}))
        for path, layer in bank.layers.items()
    ]
    loss_model(collate([Part(member.slot, member.rows[:1])]))
    for hook in hooks:
        hook.remove()
    config = loss_model.model.config
    head = loss_model.model.get_output_embeddings().weight
    return ModelShape(
        linears=tuple(
            LinearShape(layer.in_features, layer.out_features, layer.ranks[member.slot], needs_grad[path])
            for path, layer in bank.layers.items()
        ),
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def _batch_shapes(job: Job, member: Member) -> list[BatchShape]:
    """Shapes of some of the timed steps: from a short, a middling and a long one."""
    windows = [member.schedule.window(step) for step in range(job.skipped, job.steps)]
    batches = [[member.rows[i] for micro in window for i in micro] for window in windows]
    shapes = [
        BatchShape(
            tuple(len(row.input_ids) for row in batch),
            count_targets(batch),
            max(collate([Part(member.slot, batch)]).common),
        )
        for batch in batches
    ]
    shapes.sort(key=lambda shape: shape.tokens)
    return [shapes[int((i + 0.5) * len(shapes) / MEASURED_SHAPES)] for i in range(MEASURED_SHAPES)]


def _measure_products(result: Result, when: str, model: ModelShape, batches: list[BatchShape]) -> None:
    """Time the products of all tokens, and of those that are left with each batch's common beginning once."""
    result.products[when] = asdict(measure_need(model, [replace(batch, prompt=0) for batch in batches]))
    result.products_once[when] = asdict(measure_need(model, batches))


def _bare_seconds(loss_model: LossModel, member: Member, step: int) -> float:
    """The frozen base alone on a step's batch, forward and backward: the model's own cost, products and the rest."""
    start = time.perf_counter()
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output: output if output.requires_grad else output.requires_grad_()
        )
        for layer in member.bank.layers.values()
    ]
    for rows in member.schedule.window(step):
        loss_model(collate([Part(BASE_ONLY, [member.rows[i] for i in rows])])).total.backward()
    for hook in hooks:
        hook.remove()
    return time.perf_counter() - start


def _release_memory() -> None:
    """Give the operands of the measured products back, so that they do not count as the loop's peak."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak()


if __name__ == "__main__":
    serve(run)
