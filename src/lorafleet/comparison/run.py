"""``lorafleet compare``: methods beside each other on the same rows, each measured in processes of its own."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from lorafleet.comparison.folder import METHODS, RESULTS, open_comparison, slug
from lorafleet.comparison.jobs import Job, overfit, padded_speed, run_job, search_rate, train_method, use_method
from lorafleet.comparison.report import write_report
from lorafleet.comparison.result import CompareResult, gather
from lorafleet.config.compare import CompareConfig, MethodsConfig
from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import parse_methods
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig, ValidationConfig
from lorafleet.data.batches import Schedule
from lorafleet.data.load import Data, load_data
from lorafleet.errors import ConfigError, DataError, Interrupted, LorafleetError, TrainingError, raise_all
from lorafleet.files.atomic import write_json
from lorafleet.methods.method import Method, find_methods
from lorafleet.models.load import load_meta_model, load_tokenizer
from lorafleet.models.source import find_source
from lorafleet.training.report import as_text
from lorafleet.training.setup import check_run, held_out_rows

logger = logging.getLogger(__name__)

SECTIONS = (
    ModelConfig,
    DataConfig,
    LoraConfig,
    TrainingConfig,
    ValidationConfig,
    RunConfig,
    CompareConfig,
    MethodsConfig,
)


def compare(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> CompareResult:
    """Measure methods on the user's own model and rows, and write a report.

    Every method trains on the same rows in the same order for as many steps, after a short search for its own learning
    rate, and is measured on the same test rows. The same call again goes on where it was stopped; with other methods it
    adds them to the report.

    Args:
        config: A YAML file, or a mapping of knobs.
        knobs: Knobs by name; they override ``config``.

    Raises:
        ConfigError: Knobs are wrong, a method is unknown, lacks an option or does not fit the model; all at once.
        DataError: Rows cannot be read, or are too few to train, choose and test on.
        CheckpointError: ``output_dir`` holds a comparison with other settings.
        Interrupted: SIGINT or SIGTERM came; what is measured is kept.
    """
    model, data_config, lora, training, validation, run, own, wanted = load_sections(SECTIONS, config, knobs)
    settings = (model, data_config, lora, training, validation, run, own)
    methods = find_methods(parse_methods(wanted.methods), lora, training)
    check_run(model, run)
    source = find_source(model)
    faults = [fault for method in methods for fault in _unfit(model, method)]
    if run.gradient_checkpointing and any(method.kind != "lora" for method in methods):
        faults.append("gradient_checkpointing works with lora alone, and would compare unequals; leave it off")
    if negative := [count for count in own.small_rows if count < 0]:
        faults.append(f"small_rows are numbers of rows, not {negative[0]}")
    raise_all(ConfigError, faults, f"{source.name} cannot be trained so")
    data = load_data(data_config, load_tokenizer(model))
    _check_rows(data, run)
    logger.info("%s", as_text(data.report.render()))
    with open_comparison(Path(run.output_dir), settings, wanted, data.data_hash) as folder:
        base = Job(settings, Method("base", "base", None, training), folder / METHODS / "base", 0)
        logger.info("base: using it")
        run_job(use_method, base.folder / "use.json", base, {"method": "base"})
        for method in methods:
            _measure(Job(settings, method, folder / METHODS / slug(method.name), _steps(method, data)), own)
        result = gather(folder, model, data_config, data)
        write_json(folder / RESULTS, result.as_dict())
        logger.info("the report is in %s", write_report(result))
        return result


WORSE = 1.2
"""A whole training that ends at so many times the loss of its rate's short run has diverged; rows differ by less."""


def _train(job: Job, own: CompareConfig) -> tuple[float, dict[str, Any]]:
    """Train at the rate that the short runs found; where that does not hold for so long, at the next lower of theirs.

    Raises:
        TrainingError: The loss was no number, and there is no lower rate to try.
    """
    folder, name = job.folder, job.method.name
    found: dict[str, Any] = {"rate": job.method.training.learning_rate, "runs": []}
    if own.tune_lr:
        logger.info("%s: finding its learning rate", name)
        found = run_job(search_rate, folder / "rate.json", job)
    known = {run["rate"]: run["loss"] for run in found["runs"] if run["loss"] is not None}
    while True:
        rate = found["rate"]
        logger.info("%s: training at learning rate %.1e", name, rate)
        trained = run_job(train_method, folder / "train.json", job, rate)
        failed, lower = trained.get("failed"), max((one for one in known if one < rate), default=None)
        if not failed and (lower is None or trained["metrics"]["loss"] <= WORSE * known[rate]):
            return rate, trained
        (folder / "train.json").unlink()
        if lower is None:
            raise TrainingError(failed)
        logger.warning("%s: learning rate %.1e does not hold: %s", name, rate, failed or "the held-out loss rose again")
        shutil.rmtree(folder / "train")
        found |= {"rate": lower, "given_up": [*found.get("given_up", []), rate]}
        write_json(folder / "rate.json", found)


def _measure(job: Job, own: CompareConfig) -> None:
    """Do all parts of one method that are not there; a part that fails ends this method and no other."""
    name, folder = job.method.name, job.folder
    error = folder / "error.json"
    error.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "method.json",
        {"name": name, "kind": job.method.kind, "options": job.method.options, "steps": job.steps},
    )
    try:
        rate, trained = _train(job, own)
        for count in sorted({count for count in own.small_rows if count < trained["rows"]["used"]} - {0}):
            logger.info("%s: training on %d rows", name, count)
            run_job(overfit, folder / f"small-{count}.json", job, rate, count)
        logger.info("%s: training in padded batches", name)
        run_job(padded_speed, folder / "padded.json", job)
        logger.info("%s: using it", name)
        run_job(use_method, folder / "use.json", job, trained)
    except Interrupted:
        raise
    except LorafleetError as failure:
        logger.warning("%s failed: %s", name, failure)
        write_json(error, {"error": str(failure), "at": time.time()})
        if not (folder / "train.json").exists():
            shutil.rmtree(folder / "train", ignore_errors=True)


def _steps(method: Method, data: Data) -> int:
    own = method.training
    schedule = Schedule(
        len(data.splits["train"]), own.per_device_train_batch_size, own.gradient_accumulation_steps, own.seed
    )
    return schedule.total_steps(own.num_train_epochs, own.max_steps)


def _unfit(model: ModelConfig, method: Method) -> Sequence[str]:
    """Why the architecture cannot take a method; found out on a model without weights."""
    try:
        method.start(cast(PreTrainedModel, load_meta_model(model)), method.training.seed)
    except LorafleetError as error:
        return [f"method {method.name}: {error}"]
    return []


def _check_rows(data: Data, run: RunConfig) -> None:
    """Make sure that there are rows to train on, to choose by and to test on.

    Raises:
        DataError: Some are missing.
    """
    faults = []
    if "train" not in data.splits:
        faults.append(f"there are no rows to train on, only {', '.join(data.splits)}")
    if len(held_out_rows(data, run)) < 2:
        faults.append("fewer than 2 rows are held out to choose by; add a valid file or raise valid_fraction")
    if "test" in data.splits and len(data.splits["test"]) < 2:
        faults.append("fewer than 2 test rows")
    raise_all(DataError, faults, "the rows are too few for a comparison")
