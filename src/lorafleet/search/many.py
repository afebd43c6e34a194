"""A search on several workers, which share the trials of one study: processes of this machine, or tasks of Ray.

A worker that dies is started again. Its trials are still its own: it goes on from its last checkpoint, or from their
beginning, and no other worker has touched them.
"""

import logging
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from lorafleet.data.load import load_data
from lorafleet.errors import Interrupted, LorafleetError, MissingExtraError, TrainingError
from lorafleet.files.checkpoint import load_checkpoint, newest_checkpoint
from lorafleet.files.run_folder import METRICS
from lorafleet.models.load import load_base, load_tokenizer
from lorafleet.search.space import read_space
from lorafleet.search.worker import Settings, Worker
from lorafleet.training.interrupt import listen
from lorafleet.training.setup import prepare_machine

logger = logging.getLogger(__name__)

STARTS = 4
"""Times that a worker is started before its dying is taken for a fault of the search."""

_LOOK = 0.5
"""Seconds between looks at whether somebody asked to stop."""


def worker_folder(output_dir: Path, number: int) -> Path:
    """Checkpoints and log of one worker."""
    return output_dir / "workers" / str(number)


def train_with_workers(settings: Settings, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Let all workers train until no trial is left, and put their logs together.

    Args:
        settings: The sections of the search, whose study is open already.
        extra: What every worker's checkpoints hold besides.

    Returns:
        What their last checkpoints hold besides, taken together.

    Raises:
        Interrupted: SIGINT or SIGTERM came; every worker has saved a checkpoint.
        TrainingError: A worker died again and again.
        MissingExtraError: Ray is not installed.
    """
    run, search = settings[4], settings[5]
    output_dir = Path(run.output_dir)
    threads = max(1, (run.num_threads or torch.get_num_threads()) // search.workers)
    logger.info("%d workers with %d threads each", search.workers, threads)
    start: Callable[..., None] = _with_ray if search.backend == "ray" else _with_processes
    start(settings, dict(extra), threads)
    checkpoints = [newest_checkpoint(worker_folder(output_dir, number)) for number in range(search.workers)]
    found = [load_checkpoint(path)[1]["extra"] for path in checkpoints if path is not None]
    logs = [worker_folder(output_dir, number) / METRICS for number in range(search.workers)]
    (output_dir / METRICS).write_text("".join(log.read_text() for log in logs if log.exists()), encoding="utf-8")
    return {
        "before": found[0]["before"],
        "population_size": sum(one["population_size"] for one in found),
        "seconds": max(one["seconds"] for one in found),
    }


def work(settings: Settings, number: int, threads: int, extra: dict[str, Any]) -> None:
    """Be one worker: take trials until none is left."""
    form = f"worker {number}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr, force=True)
    model, data_config, lora, training, run, search, population = settings
    own_run = run.model_copy(update={"num_threads": threads})
    own_model = model.model_copy(update={"device": _device(model.device, number)})
    prepare_machine(own_run)
    data = load_data(data_config, load_tokenizer(own_model))
    space, _ = read_space(search.space, (lora, training))
    own = (own_model, data_config, lora, training, own_run, search, population)
    worker = Worker(load_base(own_model), data, space, own, f"worker {number}")
    folder = worker_folder(Path(run.output_dir), number)
    folder.mkdir(parents=True, exist_ok=True)
    worker.train(worker.open_study(), folder, newest_checkpoint(folder), extra)


def _process(settings: Settings, number: int, threads: int, extra: dict[str, Any]) -> None:
    """The same as the main function of a process: an error is a message and an exit code."""
    try:
        work(settings, number, threads, extra)
    except LorafleetError as error:
        logger.error("%s", error)
        sys.exit(error.exit_code)


def _device(device: str, number: int) -> str:
    """One GPU for each worker where there are several."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return f"cuda:{number % count}" if count > 1 else device


def _with_processes(settings: Settings, extra: dict[str, Any], threads: int) -> None:
    context = multiprocessing.get_context("spawn")

    def start(number: int) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_process, args=(settings, number, threads, extra), name=f"worker {number}")
        process.start()
        return process

    starts = dict.fromkeys(range(settings[5].workers), 1)
    with listen() as asked_to_stop:
        running = {number: start(number) for number in starts}
        try:
            while running:
                wait([process.sentinel for process in running.values()], timeout=_LOOK)
                if asked_to_stop():
                    raise Interrupted(
                        "stopped; every worker has saved a checkpoint; "
                        f"go on with: --resume-from-checkpoint true --output-dir {settings[4].output_dir}"
                    )
                for number in [number for number, process in running.items() if process.exitcode is not None]:
                    code = running.pop(number).exitcode
                    if code and starts[number] == STARTS:
                        raise TrainingError(f"worker {number} died {STARTS} times; its own messages say why")
                    if code:
                        logger.warning("worker %d died (exit code %d); starting it again", number, code)
                        starts[number] += 1
                        running[number] = start(number)
        finally:
            for process in running.values():
                process.terminate()  # SIGTERM, at which a worker finishes its step and saves
            for process in running.values():
                process.join()


def _with_ray(settings: Settings, extra: dict[str, Any], threads: int) -> None:
    if find_spec("ray") is None:
        raise MissingExtraError("backend ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    # Ray starts a task again whose worker or node has died; the task finds its checkpoint.
    task = ray.remote(num_cpus=threads, max_retries=STARTS - 1)(work)
    try:
        ray.get([task.remote(settings, number, threads, extra) for number in range(settings[5].workers)])
    except ray.exceptions.RayError as error:
        raise TrainingError(f"a worker failed on the Ray cluster: {error}") from error
