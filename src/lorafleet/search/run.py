"""``lorafleet tune``: many settings, trained side by side on one base, the worse ones stopped early."""

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.config.use import GenerationConfig
from lorafleet.data.load import Data, load_data
from lorafleet.errors import ConfigError, Interrupted, raise_all
from lorafleet.evaluation.measure import loss_metrics, measure
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.run_folder import METRICS, clear_run, open_run
from lorafleet.lora import BASE_ONLY, LoraBank
from lorafleet.models.load import Base, load_base, load_meta_model, load_tokenizer
from lorafleet.search.fit import configure, fit_faults, shapes
from lorafleet.search.halving import rung_shares
from lorafleet.search.live import LiveTable
from lorafleet.search.objectives import LABELS, objective_faults
from lorafleet.search.report import write_report
from lorafleet.search.result import TrialKeeper, TuneResult, write_results
from lorafleet.search.space import Space, read_space
from lorafleet.search.study import Study, plan_trials
from lorafleet.search.trials import Budget, Trials
from lorafleet.training.capacity import adapters_that_fit
from lorafleet.training.checkpoint import RunState
from lorafleet.training.events import Observer
from lorafleet.training.interrupt import listen
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from lorafleet.training.queue import AdapterQueue
from lorafleet.training.recompute import recompute_blocks
from lorafleet.training.report import MetricsLog, as_text, tensorboard_observer
from lorafleet.training.result import write_settings
from lorafleet.training.setup import check_run, held_out_rows, prepare_machine, run_identity

logger = logging.getLogger(__name__)

Settings = tuple[ModelConfig, DataConfig, LoraConfig, TrainingConfig, RunConfig, SearchConfig]
SECTIONS = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, RunConfig, SearchConfig)


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
        TrainingError: Every trial failed.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    started = time.perf_counter()
    settings = load_sections(SECTIONS, config, knobs)
    model_config, data_config, lora_config, training, run, search = settings
    check_run(model_config, run)
    output_dir = Path(run.output_dir)
    with open_run(output_dir, resume=run.resume_from_checkpoint, overwrite=run.overwrite) as checkpoint:
        prepare_machine(run)
        data = load_data(data_config, load_tokenizer(model_config))
        space = _checked_space(settings, data)
        logger.info("%s", as_text(data.report.render()))
        base = load_base(model_config)
        one = Search(base, data, space, settings)
        state = RunState(output_dir, one.identity(), run.save_total_limit)
        if not checkpoint:
            logger.info("measuring the base on %d held-out rows", len(one.held_out))
            state.extra["before"] = one.measure_slot(BASE_ONLY)
        if run.overwrite:  # only now, when all is checked and the base is measured
            clear_run(output_dir, keep=checkpoint)
        write_settings(output_dir, settings)
        study = Study(
            search, space, _storage(search, output_dir), _name(search, output_dir), training.seed, state.identity
        )
        keeper = TrialKeeper(output_dir, base, one.bank, data, data_config, search)
        trials = Trials(
            study,
            partial(configure, (lora_config, training)),
            one.budget,
            data.splits["train"],
            one.held_out,
            one.measure_member,
            [training.seed + number for number in range(search.seeds_per_trial)],
            lambda lora: list(one.bank.find_targets(lora)),
            keeper.keep,
        )
        one.train(trials, state, checkpoint, output_dir, started)
        result = write_results(output_dir, study, keeper, one.budget, state.extra, settings)
        logger.info("the report is in %s", write_report(result))
        return result


def _checked_space(settings: Settings, data: Data) -> Space:
    """The space of a search in which every trial can be trained and compared.

    Raises:
        ConfigError: All that is wrong with the space, the shapes of its adapters, the objectives, the rows.
    """
    model, _, lora, training, run, search = settings
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


def _storage(search: SearchConfig, output_dir: Path) -> str:
    return search.storage or f"sqlite:///{(output_dir / 'study.db').resolve()}"


def _name(search: SearchConfig, output_dir: Path) -> str:
    return search.study_name or output_dir.resolve().name


class Search:
    """A base and rows, made ready for every trial of a space."""

    def __init__(self, base: Base, data: Data, space: Space, settings: Settings) -> None:
        _, self.data_config, self.lora, self.training, self.run, self.search = settings
        self.base, self.data, self.space, self.settings = base, data, space, settings
        self.held_out = held_out_rows(data, self.run)
        self.bank = LoraBank(base.model, 2)
        self.shapes = shapes(space, (self.lora, self.training))
        if self.run.gradient_checkpointing:
            recompute_blocks(base.model, self.bank)
        rows = data.splits["train"]
        training = self.training
        steps = training.max_steps
        per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        seen = steps * per_step if steps is not None else max(1, round(training.num_train_epochs * len(rows)))
        rungs = rung_shares(self.search.reduction_factor, self.search.rungs, self.search.grace_period)
        self.budget = Budget(seen, float(rows.lengths.mean()), rungs if self.search.prunes else ())

    def identity(self) -> dict[str, Any]:
        """What decides the result of a search: a resumed one must agree in all of it."""
        mine = self.search.model_dump(mode="json", exclude={"max_memory", "population_size", "keep_trials", "storage"})
        return run_identity(self.base, self.data, *self.settings[1:5]) | {"search": mine}

    def measure_slot(self, slot: int) -> dict[str, float]:
        """The objectives that need rows, of one slot."""
        generation = GenerationConfig() if "exact_match" in self.search.objectives else None
        size = self.run.per_device_eval_batch_size
        found = measure(self.base, self.bank, slot, self.data, self.held_out, batch_size=size, generation=generation)
        return dict(found)

    def measure_member(self, member: Member) -> dict[str, float]:
        """All objectives of a member that was just evaluated; its loss is known."""
        parameters = float(sum(one.numel() for one in self.bank.state_dict(member.slot).values()))
        if {*LABELS, "exact_match"} & set(self.search.objectives):
            return self.measure_slot(member.slot) | {"parameters": parameters}
        assert member.progress.last_eval_loss is not None
        return loss_metrics(member.progress.last_eval_loss) | {"parameters": parameters}

    def train(self, trials: Trials, state: RunState, checkpoint: Path | None, output_dir: Path, started: float) -> None:
        """Train until no trial is left."""
        loss_model = LossModel(self.base.model, self.bank, self.base.tokenizer.pad_token_id)
        self.bank.reserve(self.shapes)
        loss_model.speed_up()
        queue = AdapterQueue(self.bank, trials, 0)
        step = 0
        if checkpoint:
            step = state.restore(checkpoint, lambda extra: self._restored(extra, trials, queue))
            logger.info("going on from %s", checkpoint)
        else:
            state.extra["population_size"] = self.population_size(loss_model)
            self.bank.reserve((), state.extra["population_size"])
        before = float(state.extra.get("seconds", 0.0))
        queue.size = int(state.extra["population_size"])
        logger.info("%d trials, up to %d train together", len(trials.study.records), queue.size)
        log = MetricsLog(output_dir / METRICS, state.extra.get("log_bytes", 0))
        live = LiveTable(trials, self.run.logging_steps)
        observers: list[Observer] = [log, live]
        if "tensorboard" in self.run.report_to:
            observers.append(tensorboard_observer(output_dir / "tensorboard"))
        with listen() as stop:
            population = Population(
                list(queue.members.values()),
                loss_model,
                self.bank,
                self.run,
                queue=queue,
                together=state.extra.get("together"),
                steps=step,
                observers=observers,
                save=lambda: save(),
                stop_requested=stop,
            )

            def save() -> None:
                members = list(queue.members.values())
                state.extra |= {
                    "log_bytes": log.size,
                    "seconds": before + time.perf_counter() - started,
                    "together": population.together,
                    "trials": trials.state(),
                    "slots": {member.name: member.slot for member in members},
                }
                state.save(population.steps, members)

            try:
                if not checkpoint:
                    save()  # how many train together is found out once, even if the search is killed at once
                population.train()
                save()
            except Interrupted as stopped:
                remedy = f"go on with: --resume-from-checkpoint true --output-dir {output_dir}"
                raise Interrupted(f"{stopped}; the checkpoint is in {output_dir}; {remedy}") from None
            finally:
                live.close()
                log.close()

    def population_size(self, loss_model: LossModel) -> int:
        """How many trials train together: as the user says, or as many as memory has room for."""
        given = self.search.population_size
        runs = len(plan_trials(self.search, self.space)[1]) * self.search.seeds_per_trial
        if given is not None:
            return min(given, runs)
        rows = self.data.splits["train"]
        largest = max(self.shapes, key=lambda lora: lora.r)
        size = max(training.per_device_train_batch_size for training in self._trainings())
        longest = [rows[int(i)] for i in rows.lengths.argsort()[-size:]]
        slots = [self.bank.add(largest, slot=slot) for slot in range(2)]
        self.bank.train()
        slot_bytes = sum(one.value.nbytes for one in self.bank.slot_parameters(0).values())
        fitting = adapters_that_fit(loss_model, longest, slots, slot_bytes, self.search.max_memory)
        for slot in slots:
            self.bank.remove(slot)
        return min(fitting, runs)

    def _trainings(self) -> list[TrainingConfig]:
        """The training knobs at every end of the space."""
        own = (self.lora, self.training)
        return [
            configure(own, one.settings(value))[1] for one in self.space.dimensions for value in one.domain.samples
        ] or [self.training]

    def _restored(self, extra: Mapping[str, Any], trials: Trials, queue: AdapterQueue) -> list[Member]:
        self.bank.reserve((), extra["population_size"])
        trials.load(extra["trials"])
        return [queue.place(trials.candidate_of(name), slot) for name, slot in extra["slots"].items()]
