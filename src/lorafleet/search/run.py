"""``lorafleet tune``: many settings, trained side by side on one base, the worse ones stopped early."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import PopulationConfig, RunConfig, TrainingConfig
from lorafleet.data.load import Data, load_data
from lorafleet.errors import ConfigError, raise_all
from lorafleet.files.run_folder import clear_run, open_run
from lorafleet.lora import BASE_ONLY
from lorafleet.models.load import load_base, load_meta_model, load_tokenizer
from lorafleet.search.fit import fit_faults, shapes
from lorafleet.search.many import train_with_workers
from lorafleet.search.objectives import objective_faults
from lorafleet.search.report import write_report
from lorafleet.search.result import TuneResult, write_results
from lorafleet.search.space import Space, read_space
from lorafleet.search.study import plan_trials
from lorafleet.search.worker import Settings, Worker
from lorafleet.training.report import as_text
from lorafleet.training.result import write_settings
from lorafleet.training.setup import check_run, held_out_rows, prepare_machine

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, RunConfig, SearchConfig, PopulationConfig)


def tune(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> TuneResult:
    """Find the best settings of a LoRA adapter by training many side by side.

    Args:
        config: A YAML file, or a mapping of knobs.
        knobs: Knobs by name; they override ``config``.

    Returns:
        The ranking of all trials; ``best`` is the folder of the winner's adapter.

    Raises:
        ConfigError: Knobs or the search space are wrong, or do not fit the model or the data; all faults at once.
        DataError: Rows cannot be read or trained.
        CheckpointError: ``output_dir`` or the storage holds another run, or its checkpoint does not belong to this one.
        TrainingError: Every trial failed, or a worker does again and again.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    settings = load_sections(SECTIONS, config, knobs)
    model_config, data_config, _, _, run, search, _ = settings
    check_run(model_config, run)
    output_dir = Path(run.output_dir)
    with open_run(output_dir, resume=run.resume_from_checkpoint, overwrite=run.overwrite) as checkpoint:
        prepare_machine(run)
        data = load_data(data_config, load_tokenizer(model_config))
        space = checked_space(settings, data)
        logger.info("%s", as_text(data.report.render()))
        worker = Worker(load_base(model_config), data, space, settings)
        extra: dict[str, Any] = {}
        if not checkpoint:
            logger.info("measuring the base on %d held-out rows", len(worker.held_out))
            extra["before"] = worker.measure_slot(BASE_ONLY)
        if run.overwrite:  # only now, when all is checked and the base is measured
            clear_run(output_dir, keep=checkpoint)
        write_settings(output_dir, settings)
        study = worker.open_study()
        if search.workers == 1:
            extra = worker.train(study, output_dir, checkpoint, extra)
        else:
            extra = train_with_workers(settings, extra)
        result = write_results(worker, study, extra)
        logger.info("the report is in %s", write_report(result))
        return result


def checked_space(settings: Settings, data: Data) -> Space:
    """The space of a search in which every trial can be trained and compared.

    Raises:
        ConfigError: All that is wrong with the space, the shapes of its adapters, the objectives, the rows.
    """
    model, _, lora, training, run, search, _ = settings
    space, faults = read_space(search.space, (lora, training))
    faults += fit_faults(load_meta_model(model), shapes(space, (lora, training)))
    faults += objective_faults(search.objectives, data)
    if "train" not in data.splits or not held_out_rows(data, run):
        faults.append("a search needs rows to train on and held-out rows to compare by; see valid_fraction")
    try:
        plan_trials(search, space)
    except ConfigError as error:
        faults.append(str(error))
    raise_all(ConfigError, faults, "the search cannot be run")
    return space
