"""What is measured of one method, each part in a process of its own, so that its memory is its own.

    rate.json     the learning rate it found, and the rates it tried
    train/        its run folder, as ``lorafleet train`` leaves it
    small-N.json  how far it overfits when it trains as long on N rows
    padded.json   its training speed with padded batches, which methods with virtual tokens need
    use.json      what it is like to use: storage, loading, speed, quality, forgetting

A part that is there is not done again.
"""

import json
import logging
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from lorafleet.comparison.quality import quality_intervals
from lorafleet.comparison.rates import find_rate, train_briefly
from lorafleet.comparison.speed import measure_speed
from lorafleet.config.compare import CompareConfig
from lorafleet.config.data import DataConfig
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig, ValidationConfig
from lorafleet.config.use import GenerationConfig
from lorafleet.data.load import load_data
from lorafleet.data.store import sample
from lorafleet.errors import Interrupted, LorafleetError, TrainingError
from lorafleet.evaluation.measure import measure, references_of, short_answer
from lorafleet.evaluation.token_loss import LossModel, mean_loss, row_losses
from lorafleet.files.adapter import CONFIG, WEIGHTS
from lorafleet.files.atomic import write_json, write_text
from lorafleet.files.checkpoint import newest_checkpoint
from lorafleet.files.manifest import MANIFEST
from lorafleet.files.method import METHOD, METHOD_WEIGHTS, load_saved
from lorafleet.files.run_folder import METRICS
from lorafleet.generation.adapted import Adapted, with_template
from lorafleet.lora import LoraBank
from lorafleet.methods.method import Method
from lorafleet.methods.saved import restore
from lorafleet.models.load import load_base
from lorafleet.models.machine import peak_memory_bytes, pick_device
from lorafleet.training.interrupt import listen
from lorafleet.training.run import train
from lorafleet.training.setup import held_out_rows, prepare_machine

logger = logging.getLogger(__name__)

Settings = tuple[ModelConfig, DataConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig, CompareConfig]

GENERAL = "sample:general_chat"
"""Text that has nothing to do with the task, on which forgetting is measured."""

RANKING_ROWS = 64
"""Held-out rows that learning rates are ranked by: the same for all, and rates differ more than rows do."""

PADDED_STEPS = 8
"""Steps in which the speed of padded batches is measured."""

_LOOK = 0.5
"""Seconds between looks at whether somebody asked to stop."""


class Job(NamedTuple):
    """One method of a comparison.

    Args:
        settings: The comparison's.
        method: The method.
        folder: For all that is found out about it.
        steps: Of its training, schedule included.
    """

    settings: Settings
    method: Method
    folder: Path
    steps: int

    def training(self, rate: float) -> TrainingConfig:
        """The method's training knobs at this rate."""
        return self.method.training.model_copy(update={"learning_rate": rate, "max_steps": self.steps})


def search_rate(job: Job) -> dict[str, Any]:
    """Find the method's own learning rate."""
    model, data_config, _, _, _, run, compare = job.settings
    prepare_machine(run)
    base = load_base(model)
    data = load_data(data_config, base.tokenizer)
    training = job.method.training
    slots = job.method.start(base.model, training.seed)
    steps = compare.lr_steps or max(1, job.steps // 5)
    rows, held_out = data.splits["train"], sample(held_out_rows(data, run), RANKING_ROWS)
    return find_rate(base, slots, training, rows, held_out, run, steps, compare.lr_runs)


def train_method(job: Job, rate: float) -> dict[str, Any]:
    """Train as ``lorafleet train`` does, and read what it has left; ``failed`` is why, where the loss was no number."""
    model, data, _, _, validation, run, _ = job.settings
    folder = job.folder / "train"
    begun = newest_checkpoint(folder) is not None
    again = {"output_dir": str(folder), "resume_from_checkpoint": begun, "overwrite": not begun}
    own_run = run.model_copy(update=again)
    knobs: dict[str, Any] = {}
    for section in (model, data, job.training(rate), validation, own_run):
        knobs |= section.model_dump()
    own = job.method.config
    knobs |= own.model_dump() if isinstance(own, LoraConfig) else {"method": job.method.words}
    try:
        result = train(knobs).as_dict()
    except TrainingError as error:
        return {"failed": str(error)}
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    result["curve"] = [{key: line[key] for key in ("step", "loss", "eval_loss") if key in line} for line in lines]
    return result


def overfit(job: Job, rate: float, count: int) -> dict[str, Any]:
    """Train as long on so few rows, and compare the loss on them with that on held-out ones."""
    model, data_config, _, _, _, run, _ = job.settings
    prepare_machine(run)
    base = load_base(model)
    data = load_data(data_config, base.tokenizer)
    slots = job.method.start(base.model, job.method.training.seed)
    rows, held_out = sample(data.splits["train"], count), held_out_rows(data, run)
    loss_model = LossModel(base.model, slots, base.tokenizer.pad_token_id)
    loss_model.speed_up()
    good = train_briefly(loss_model, slots, job.training(rate), rows, run).progress.status != "failed"
    size = run.per_device_eval_batch_size
    losses = [mean_loss(row_losses(loss_model, some, 0, size)) if good else None for some in (rows, held_out)]
    return {"rows": len(rows), "train_loss": losses[0], "eval_loss": losses[1]}


def padded_speed(job: Job) -> dict[str, Any]:
    """Training speed with padded batches, which methods with virtual tokens need: the same path and steps for all."""
    model, data_config, _, _, _, run, _ = job.settings
    prepare_machine(run)
    base = load_base(model)
    rows = load_data(data_config, base.tokenizer).splits["train"]
    own = job.training(job.method.training.learning_rate)
    own = own.model_copy(update={"max_steps": min(own.max_steps or 1, PADDED_STEPS)})
    slots = job.method.start(base.model, own.seed)
    loss_model = LossModel(base.model, slots, base.tokenizer.pad_token_id, padded=True)
    loss_model.speed_up()
    member = train_briefly(loss_model, slots, own, rows, run)
    return {"tokens_per_second": member.progress.tokens / member.progress.seconds, "steps": member.progress.step}


def use_method(job: Job, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Load what was trained and measure what using it is like, beside its base."""
    model, data_config, _, _, _, run, compare = job.settings
    prepare_machine(run)
    adapted, load_seconds = _load(model, trained)
    base, slots, slot = adapted.base, adapted.bank, adapted.slot
    data = load_data(data_config, base.tokenizer)
    rows = sample(data.splits["test" if "test" in data.splits else "valid"], compare.max_test_rows)
    asks = data.task != "label" and any(row.prompt_length for row in rows)
    generation = GenerationConfig() if asks or any(short_answer(row) is not None for row in rows) else None
    predictions: list[dict[str, Any]] = []
    size = run.per_device_eval_batch_size
    loss_model = LossModel(base.model, slots, base.tokenizer.pad_token_id)
    found: dict[str, Any] = {
        "tested_rows": len(rows),
        "load_seconds": load_seconds,
        "rows": {},
        "storage_bytes": 0 if trained["method"] == "base" else _bytes(Path(trained["adapter"])),
        "quality": measure(
            base, loss_model, slot, data, rows, batch_size=size, generation=generation, predictions=predictions
        ),
    }
    if not math.isfinite(found["quality"]["loss"]):
        raise TrainingError("the loss of what was trained is no number on the rows to test on")
    for key in ("loss_sum", "loss_tokens", "label_right", "text_right"):
        if column := [float(entry[key]) for entry in predictions if key in entry]:
            found["rows"][key] = column
    if "label" in predictions[0]:
        found["rows"]["predicted"] = [entry["label"] for entry in predictions]
        found["rows"]["wanted"] = [row.reference for row in rows]
    answered = [i for i, row in enumerate(rows) if asks and row.prompt_length and short_answer(row) is None]
    if answered:
        found["rows"]["texts"] = [predictions[i]["text"] for i in answered]
        found["rows"]["references"] = [references_of(rows[i]) for i in answered]
    found["intervals"] = quality_intervals(found["rows"])
    other = DataConfig(data=GENERAL, max_length=data_config.max_length, chat_template=data_config.chat_template)
    general = list(load_data(other, base.tokenizer).splits["test"])
    some = {"general": general}
    if trained["method"] != "base":
        some["train"] = sample(data.splits["train"], len(rows))
    for name, chosen in some.items():
        found[f"{name}_loss"] = mean_loss(row_losses(loss_model, chosen, slot, size))
    prompts = [[int(token) for token in row.input_ids[: row.prompt_length or len(row.input_ids) // 2]] for row in rows]
    found["speed"] = asdict(measure_speed(base, slots, slot, prompts, compare.new_tokens))
    found["padded"] = slots is not None and slots.padded_model is not None
    found["dtype"] = str(base.dtype).removeprefix("torch.")
    if isinstance(slots, LoraBank):
        slots.merge(0)
        found["merged_speed"] = asdict(measure_speed(base, slots, slot, prompts, compare.new_tokens))
    return found


def _load(model: ModelConfig, trained: Mapping[str, Any]) -> tuple[Adapted, float]:
    """What was trained, and the seconds it took to load on a base that is there; of a whole model, to load it."""
    base = load_base(model)  # whatever a first call makes ready, is ready after it
    begin = time.perf_counter()
    if trained["method"] == "full":
        del base
        adapted = Adapted(
            load_base(model.model_copy(update={"model_name_or_path": trained["adapter"], "revision": None}))
        )
    elif trained["method"] == "base":
        adapted = Adapted(base)
    else:
        saved = load_saved(Path(trained["adapter"]))
        slots = restore(base.model, saved)
        adapted = Adapted(with_template(base, None, Path(trained["adapter"])), slots, saved)
    return adapted, time.perf_counter() - begin


def _bytes(folder: Path) -> int:
    """What has to be kept of a task: weights and config, not the tokenizer, which all tasks share."""
    kept = (CONFIG, WEIGHTS, METHOD, METHOD_WEIGHTS, MANIFEST, "config.json", "generation_config.json")
    files = [path for path in folder.iterdir() if path.name in kept or path.match("model*.safetensors*")]
    return sum(path.stat().st_size for path in files)


def run_job(function: Callable[..., dict[str, Any]], path: Path, job: Job, *arguments: Any) -> dict[str, Any]:
    """Let a process do a part, unless what it found is there already.

    Args:
        function: The part.
        path: Where what it finds is kept.
        job: Its first argument.
        arguments: Its others.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the process was told.
        TrainingError: The part failed; the message is its own.
    """
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    path.parent.mkdir(parents=True, exist_ok=True)
    why = path.with_suffix(".error")
    why.unlink(missing_ok=True)
    process = _context().Process(target=_part, args=(function, path, why, job, arguments))
    with listen() as asked_to_stop:
        process.start()
        try:
            while process.is_alive():
                wait([process.sentinel], timeout=_LOOK)
                if asked_to_stop():
                    raise Interrupted("stopped; the same command goes on from here")
        finally:
            process.terminate()  # SIGTERM, at which training finishes its step and saves
            process.join()
    if process.exitcode or not path.exists():
        known = why.read_text(encoding="utf-8") if why.exists() else ""
        died = "the system ended the process; was memory short?" if process.exitcode == -9 else "the process died"
        raise TrainingError(known or f"{died} (exit code {process.exitcode})")
    return dict(json.loads(path.read_text(encoding="utf-8")))


@cache
def _context() -> Any:
    """Processes that have imported all they need and hold nothing else; plain new ones where there are no forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _part(function: Callable[..., dict[str, Any]], path: Path, why: Path, job: Job, arguments: tuple[Any, ...]) -> None:
    """The main function of a process: an error is a message in a file and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        found = function(job, *arguments)
    except LorafleetError as error:
        write_text(why, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except Exception as error:  # of torch or PEFT: its reason belongs into the report
        write_text(why, f"{type(error).__name__}: {error}")
        raise
    write_json(path, found | {"process_peak_bytes": peak_memory_bytes(pick_device(job.settings[0].device))})
