"""One worker of a search: a base, rows and a bank, made ready for every trial; and its share of the trials."""

import logging
import math
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.lora import LoraConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import PopulationConfig, RunConfig, TrainingConfig
from lorafleet.config.use import GenerationConfig
from lorafleet.data.load import Data
from lorafleet.evaluation.measure import loss_metrics, measure
from lorafleet.evaluation.metrics import ANSWERS
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.generation.latency import relative_latency
from lorafleet.lora import LoraBank
from lorafleet.models.load import Base
from lorafleet.search.fit import configure, shapes
from lorafleet.search.halving import rung_shares
from lorafleet.search.keeper import TrialKeeper
from lorafleet.search.live import LiveTable
from lorafleet.search.objectives import LABELS
from lorafleet.search.space import Space
from lorafleet.search.study import Study, plan_trials
from lorafleet.search.trials import Budget, Trials
from lorafleet.training.capacity import adapters_of_a_pass, measured_capacity
from lorafleet.training.checkpoint import RunState
from lorafleet.training.member import Member
from lorafleet.training.queued import train_queued
from lorafleet.training.recompute import recompute_blocks
from lorafleet.training.schedule import warmup_steps
from lorafleet.training.setup import held_out_rows, run_identity

logger = logging.getLogger(__name__)

Settings = tuple[ModelConfig, DataConfig, LoraConfig, TrainingConfig, RunConfig, SearchConfig, PopulationConfig]


class Worker:
    """A base and rows, made ready for every trial of a space.

    Args:
        base: The base; its layers are replaced by a bank's.
        data: Rows to train on and to compare by.
        space: A space that has been checked.
        settings: The sections of the search.
        name: By which trials are known to be this worker's; empty where it is the only one.
    """

    def __init__(self, base: Base, data: Data, space: Space, settings: Settings, name: str = "") -> None:
        _, self.data_config, self.lora, self.training, self.run, self.search, self.population = settings
        self.base, self.data, self.space, self.settings, self.name = base, data, space, settings, name
        self.held_out = held_out_rows(data, self.run)
        self.bank = LoraBank(base.model, 2)
        self.shapes = shapes(space, (self.lora, self.training))
        if self.run.gradient_checkpointing:
            recompute_blocks(base.model, self.bank)
        self.loss_model = LossModel(base.model, self.bank, base.tokenizer.pad_token_id)
        rows = data.splits["train"]
        training = self.training
        if training.max_steps is not None:
            seen = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
        else:
            seen = max(1, round(training.num_train_epochs * len(rows)))
        rungs = rung_shares(self.search.reduction_factor, self.search.rungs, self.search.grace_period)
        self.budget = Budget(seen, float(rows.lengths.mean()), rungs if self.search.prunes else ())
        steps, first = self.budget.steps(training), self.budget.steps(training, (*self.budget.shares, 1.0)[0])
        if (warmup := warmup_steps(training, steps)) >= first:
            logger.warning(
                "trials are first compared after step %d of %d, when the learning rate has not come out of its warm-up "
                "of %d steps; give them more steps, fewer rungs or a grace_period",
                *(first, steps, warmup),
            )

    def identity(self) -> dict[str, Any]:
        """What decides the result of a search: a resumed one must agree in all of it, and every worker too."""
        mine = self.search.model_dump(mode="json", exclude=_FREE)
        _, data_config, lora, training, run, *_ = self.settings
        of_lora = lora.model_dump(mode="json")
        return run_identity(self.base, self.data, data_config, "lora", of_lora, training, run) | {"search": mine}

    def measure_slot(self, slot: int) -> dict[str, float]:
        """The objectives that need rows, of one slot."""
        generation = GenerationConfig() if {*ANSWERS} & set(self.search.objectives) else None
        size = self.run.per_device_eval_batch_size
        return measure(
            self.base, self.loss_model, slot, self.data, self.held_out, batch_size=size, generation=generation
        )

    def measure_member(self, member: Member) -> dict[str, float]:
        """All objectives of a member that was just evaluated; its loss is known."""
        costs = {"parameters": float(sum(one.value.numel() for one in self.bank.slot_parameters(member.slot).values()))}
        if "latency" in self.search.objectives:
            costs["latency"] = relative_latency(self.base, self.bank, member.slot)
        if {*LABELS, *ANSWERS} & set(self.search.objectives):
            return self.measure_slot(member.slot) | costs
        assert member.progress.last_eval_loss is not None
        return loss_metrics(member.progress.last_eval_loss) | costs

    def open_study(self) -> Study:
        """The record of the search, made where there is none."""
        output_dir = Path(self.run.output_dir).resolve()
        url = self.search.storage or f"sqlite:///{output_dir / 'study.db'}"
        name = self.search.study_name or output_dir.name
        owner = f"{socket.gethostname()}:{output_dir} {self.name}".rstrip()
        return Study(self.search, self.space, url, name, self.training.seed, self.identity(), owner)

    def train(self, study: Study, folder: Path, checkpoint: Path | None, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Train until no trial is left.

        Args:
            study: Where trials come from.
            folder: For this worker's checkpoints and log.
            checkpoint: To go on from.
            extra: What its checkpoints are to hold besides.

        Returns:
            What its last checkpoint holds besides.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
        """
        keeper = TrialKeeper(self.base, self.bank, self.data, self.data_config, self.run, self.search)
        trials = Trials(
            study,
            partial(configure, (self.lora, self.training)),
            self.budget,
            self.data.splits["train"],
            self.held_out,
            self.measure_member,
            [self.training.seed + number for number in range(self.search.seeds_per_trial)],
            lambda lora: list(self.bank.find_targets(lora)),
            keeper.keep,
            Path(self.run.output_dir).resolve(),
        )
        state = RunState(folder, self.identity(), self.run.save_total_limit, extra)
        logger.info("%d trials", len(trials.study.records))
        train_queued(
            trials,
            self.shapes,
            self.bank,
            self.loss_model,
            self.run,
            state,
            checkpoint,
            room=self.population_size,
            display=lambda: LiveTable(trials, self.run.logging_steps, alone=not self.name),
        )
        return state.extra

    def population_size(self) -> tuple[int, int | None]:
        """How many trials train together, and how many of them in one pass; as many as have room if it is not known.

        Without a number from the user that is what a pass has room for, and in a grid as many more as it takes for one
        of them to come through all rungs: where fewer meet at a rung, more of them go on.
        """
        given = self.population.population_size
        sampler, queued = plan_trials(self.search, self.space)
        runs = len(queued) * self.search.seeds_per_trial
        rows = self.data.splits["train"]
        sizes = [min(one.per_device_train_batch_size, len(rows)) for one in self._trainings()]
        tokens = fmean(sizes) * float(rows.lengths.mean())
        if given is not None:
            return min(given, runs), adapters_of_a_pass(tokens, self.loss_model.device)
        compared = 1 if sampler != "grid" else round(1 / min((*self.budget.shares, 1.0))) * self.search.seeds_per_trial
        wanted = min(runs, math.ceil(compared / self.search.workers))
        longest = [rows[int(i)] for i in rows.lengths.argsort()[-max(sizes) :]]
        share = self.population.max_memory
        fitting, together = measured_capacity(self.loss_model, self.bank, self.shapes, longest, share, wanted, tokens)
        return min(fitting, runs), together

    def _trainings(self) -> list[TrainingConfig]:
        """The training knobs at every end of the space."""
        own = (self.lora, self.training)
        return [
            configure(own, one.settings(value))[1] for one in self.space.dimensions for value in one.domain.samples
        ] or [self.training]


_FREE = {"keep_trials", "storage", "backend"}
"""Knobs of a search that change nothing in what a trial is worth."""
