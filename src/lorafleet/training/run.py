"""``lorafleet train``: one adapter, or a whole model, from rows to files."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafleet.config.data import DataConfig
from lorafleet.config.load import load_sections
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import MethodConfig, parse_methods
from lorafleet.config.model import ModelConfig
from lorafleet.config.training import RunConfig, TrainingConfig, ValidationConfig
from lorafleet.data.load import load_data
from lorafleet.errors import ConfigError, TrainingError
from lorafleet.evaluation.measure import measure
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.deployability import deployability
from lorafleet.files.run_folder import clear_run, open_run
from lorafleet.lora import BASE_ONLY, LoraBank, Slots
from lorafleet.methods.method import Method, find_methods
from lorafleet.models.load import load_base
from lorafleet.training.checkpoint import RunState
from lorafleet.training.events import Failed, Saved
from lorafleet.training.interrupt import listen
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from lorafleet.training.recompute import recompute_blocks
from lorafleet.training.report import ProgressReport, as_text, reporting
from lorafleet.training.result import TrainResult, write_results, write_settings
from lorafleet.training.setup import check_run, held_out_rows, prepare_machine, run_identity

logger = logging.getLogger(__name__)

SECTIONS = (ModelConfig, DataConfig, MethodConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig)
NAME = "adapter"


def train(config: Mapping[str, Any] | str | Path | None = None, /, **knobs: Any) -> TrainResult:
    """Train one adapter and write it, a LoRA adapter in PEFT's format; or train all weights and write the model.

    Args:
        config: A YAML file, or a mapping of knobs.
        knobs: Knobs by name; they override ``config``.

    Returns:
        What was trained, on what, how well and how fast; ``adapter`` is the folder to load.

    Raises:
        ConfigError: Knobs are unknown or out of range, or do not fit the model.
        DataError: Rows cannot be read or trained.
        CheckpointError: ``output_dir`` holds another run, or its checkpoint does not belong to this one.
        TrainingError: The loss or gradient became NaN or infinite; the last good state is saved.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    started = time.perf_counter()
    settings = load_sections(SECTIONS, config, knobs)
    model_config, data_config, method_config, lora_config, training, validation, run = settings
    check_run(model_config, run)
    method = one_method(method_config, lora_config, training)
    settings = (model_config, data_config, method_config, lora_config, method.training, validation, run)
    if run.gradient_checkpointing and method.kind != "lora":
        raise ConfigError(f"gradient_checkpointing works with lora, not with {method.kind}; leave it off")
    output_dir = Path(run.output_dir)
    with open_run(output_dir, resume=run.resume_from_checkpoint, overwrite=run.overwrite) as checkpoint:
        prepare_machine(run)
        base = load_base(model_config)
        data = load_data(data_config, base.tokenizer)
        rows = data.train
        logger.info("%s", as_text(data.report.render()))
        slots = method.start(base.model, method.training.seed)
        if isinstance(slots, LoraBank) and isinstance(method.config, LoraConfig):
            if run.gradient_checkpointing:
                recompute_blocks(base.model, slots)
            _tell_deployability(method.config, slots)
        loss_model = LossModel(base.model, slots, base.tokenizer.pad_token_id)
        held_out = held_out_rows(data, run)
        member = Member(NAME, slots, 0, method.training, rows, held_out)
        deciding = run_identity(base, data, data_config, method.kind, method.options, method.training, run)
        deciding["validation"] = validation.model_dump(mode="json")
        state = RunState(output_dir, deciding, run.save_total_limit)

        def measured(slot: int) -> dict[str, float]:
            size = run.per_device_eval_batch_size
            return measure(base, loss_model, slot, data, held_out, batch_size=size) if held_out else {}

        resume_step = state.restore(checkpoint, lambda _: [member]) if checkpoint else 0
        if checkpoint:
            logger.info("going on from %s, step %d of %d", checkpoint, resume_step, member.total_steps)
        else:
            logger.info("measuring the base on %d held-out rows", len(held_out))
            # A model that is to train whole is its own base until it has.
            state.extra["before"] = measured(0 if method.kind == "full" else BASE_ONLY)
        if run.overwrite:  # only now, when all is checked and the base is measured
            clear_run(output_dir, keep=checkpoint)
        write_settings(output_dir, [s for s in settings if method.kind == "lora" or not isinstance(s, LoraConfig)])
        _run(loss_model, slots, member, validation, run, state, output_dir, resume_step)
        if validation.load_best_model_at_end and member.restore_best():
            logger.info("taking the adapter of step %d, the lowest held-out loss", member.progress.best_step)
        before_and_after = (state.extra["before"], measured(member.slot))
        return write_results(output_dir, base, member, method, data, settings, before_and_after, started)


def one_method(config: MethodConfig, lora: LoraConfig, training: TrainingConfig) -> Method:
    """The method that a run trains.

    Raises:
        ConfigError: There is no such method, it lacks an option that is given, or several are named; or options of LoRA
            are given to another.
    """
    specs = parse_methods(config.method)
    if len(specs) > 1:
        raise ConfigError(f"method = {config.method!r} names {len(specs)} methods; a run trains one")
    (method,) = find_methods(specs, lora, training)
    given = lora.model_fields_set | ({"loraplus_lr_ratio"} if training.loraplus_lr_ratio != 1 else set())
    if method.kind != "lora" and given:
        raise ConfigError(f"method {method.name} has no knobs of lora; given are {', '.join(sorted(given))}")
    return method


def _tell_deployability(config: LoraConfig, bank: LoraBank) -> None:
    for runtime, reasons in deployability(config, bank.targets(0)).items():
        if reasons:
            logger.warning("this adapter will not run in %s as it is: %s", runtime, "; ".join(reasons))


def _run(
    loss_model: LossModel,
    slots: Slots,
    member: Member,
    validation: ValidationConfig,
    run: RunConfig,
    state: RunState,
    output_dir: Path,
    resume_step: int,
) -> None:
    """Train with logs, checkpoints and signal handling around the loop."""
    loss_model.speed_up()
    failures: list[Failed] = []
    progress = ProgressReport(run.logging_steps, resume_step)
    with listen() as stop, reporting(output_dir, run, state.extra.get("log_bytes", 0), progress) as (log, observers):

        def save() -> None:
            state.extra["log_bytes"] = log.size
            progress(Saved(member.progress.step, str(state.save(member.progress.step, [member]))))

        observers.append(lambda event: failures.append(event) if isinstance(event, Failed) else None)
        Population(
            [member],
            loss_model,
            slots,
            run,
            validation=validation,
            steps=resume_step,
            observers=observers,
            save=save,
            stop_requested=stop,
        ).train()
    if failures:
        _stop_at_nan(failures[0], member, state)


def _stop_at_nan(failure: Failed, member: Member, state: RunState) -> None:
    member.progress.status = "training"  # so that resuming meets the same step, instead of taking it for done
    path = state.save(member.progress.step, [member])
    raise TrainingError(
        f"stopped in step {failure.step}: {failure.reason}. The batch's rows: {', '.join(failure.rows)}. "
        f"The state before that step is in {path}. Look at those rows, or lower learning_rate or max_grad_norm"
    )
