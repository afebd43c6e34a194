"""``lorafleet fleet``: one adapter for each task or user, trained together, let through gates, kept in the registry."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafleet.config.fleet import GateConfig
from lorafleet.config.yaml_text import dump_mapping
from lorafleet.errors import ConfigError, DataError, raise_all
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.atomic import write_json, write_text
from lorafleet.files.run_folder import SETTINGS, clear_run, open_run, provenance
from lorafleet.fleets.checks import metric_faults, shape_faults, shared_kinds, structure_faults
from lorafleet.fleets.judge import Judge, gain_over
from lorafleet.fleets.measure import Columns, pooled
from lorafleet.fleets.members import FleetCandidates, FleetMember, load_members
from lorafleet.fleets.mixture import mixture_member
from lorafleet.fleets.plan import FleetPlan, MemberPlan, read_plan
from lorafleet.fleets.report import write_report
from lorafleet.fleets.result import FleetResult, MemberResult, Way
from lorafleet.fleets.train import train_members
from lorafleet.fleets.users import KEYED, PLAIN, ROWS, Users, clear_rows, kind_of, split_users
from lorafleet.fleets.ways import compare_ways
from lorafleet.lora import LoraBank
from lorafleet.models.load import Base, load_base, load_meta_model, load_tokenizer
from lorafleet.registry.registry import Registry
from lorafleet.training.recompute import recompute_blocks
from lorafleet.training.setup import check_run, prepare_machine

logger = logging.getLogger(__name__)

ADAPTERS, COMBINED, RESULTS = "adapters", "combined", "fleet.json"


def fleet(config: Mapping[str, Any] | str | os.PathLike[str], /, **knobs: Any) -> FleetResult:
    """Train one adapter for each task or user, compare each with its rivals, and let the good ones through.

    Args:
        config: A YAML file with ``tasks`` or ``users``, or the same as a mapping; see :mod:`lorafleet.fleets.plan`.
        knobs: Knobs of its top level; they override ``config``.

    Returns:
        Every member with its scores and what became of it.

    Raises:
        ConfigError: The structure is wrong, adapters do not fit the base or each other, or a gate does not fit the
            rows; all faults of each at once.
        DataError: Users cannot be told apart; no member has rows to train on, or not the one that others start from.
        CheckpointError: ``output_dir`` holds another run, or its checkpoint does not belong to this one.
        RegistryError: The registry cannot be used.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    started = time.perf_counter()
    plan = read_plan(config, knobs)
    raise_all(ConfigError, structure_faults(plan), "the fleet cannot start")
    check_run(plan.model, plan.run)
    registry = None
    if plan.fleet.keep:
        registry = Registry(plan.registry.registry, plan.registry.registry_database, create=True)
        registry.check_files()
    output_dir = Path(plan.run.output_dir)
    with open_run(output_dir, resume=plan.run.resume_from_checkpoint, overwrite=plan.run.overwrite) as checkpoint:
        prepare_machine(plan.run)
        users, plans, left_out = _members_of(plan, output_dir / ROWS)
        mixed = [replace(plan.defaults, name=PLAIN)] if users is None and PLAIN in shared_kinds(plan) else []
        raise_all(ConfigError, shape_faults(load_meta_model(plan.model), [*plans, *mixed]), "no fleet")
        members, unreadable = load_members(plans, load_tokenizer(plan.model), output_dir / ADAPTERS)
        left_out |= unreadable
        raise_all(ConfigError, metric_faults(members), "no fleet")
        if not members:
            raise DataError(f"no member has rows to train on; the first: {next(iter(left_out.values()))}")
        if plan.fleet.warm_start and PLAIN in left_out:
            raise DataError(f"warm_start needs the shared adapter, which is left out: {left_out[PLAIN]}")
        tasks = members if users is None else []
        if tasks and mixed:
            members = [mixture_member(tasks, plan.fleet, plan.defaults, output_dir / ADAPTERS), *tasks]
        base = load_base(plan.model)
        if plan.run.overwrite:
            clear_run(output_dir, keep=checkpoint)
        write_text(output_dir / SETTINGS, dump_mapping(plan.source))
        write_json(output_dir / "provenance.json", provenance())
        bank = LoraBank(base.model, 2)
        if plan.run.gradient_checkpointing:
            recompute_blocks(base.model, bank)
        loss_model = LossModel(base.model, bank, base.tokenizer.pad_token_id)
        candidates = _candidates(plan, members, base, bank, users)
        begun = time.perf_counter()
        trained = train_members(plan, loss_model, candidates, checkpoint)
        started -= trained["seconds"] - (time.perf_counter() - begun)  # training before an interruption counts
        judge = Judge(plan, candidates, loss_model, registry, users)
        judged = [judge.judge(member) for member in members if member.plan.name not in candidates.failures]
        for status, names in (("failed", candidates.failures), ("left out", left_out)):
            judged += [MemberResult(n, kind_of(n, users), status=status, reasons=(why,)) for n, why in names.items()]
        users_rows = [judge.columns[one.name] for one in judged if one.kind == "user" and one.gain is not None]
        result = FleetResult(
            output_dir=str(output_dir),
            model=base.name,
            members=tuple(judged),
            ways=tuple(_ways(plan, tasks, judged, judge, output_dir / COMBINED)),
            **pool(users_rows),
            population_size=trained["population_size"],
            tokens=sum(one.tokens for one in judged),
            train_seconds=trained["seconds"],
            seconds=time.perf_counter() - started,
        )
        write_json(output_dir / RESULTS, result.as_dict())
        logger.info("the report is in %s", write_report(result))
        return result


def _ways(
    plan: FleetPlan, tasks: Sequence[FleetMember], judged: Sequence[MemberResult], judge: Judge, folder: Path
) -> list[Way]:
    """The table of ways, where a fleet of tasks has more than one."""
    results = {one.name: one for one in judged if one.scores}
    there = [task for task in tasks if task.plan.name in results]
    if len(there) < 2 or not (plan.fleet.combine or plan.fleet.shared == "plain"):
        return []
    shared, most_rows = judge.shared.get(PLAIN), plan.run.max_eval_rows
    return compare_ways(there, results, judge.rivals, shared, plan.fleet.combine, most_rows, folder)


def _candidates(
    plan: FleetPlan, members: Sequence[FleetMember], base: Base, bank: LoraBank, users: Users | None
) -> FleetCandidates:
    """Who trains. Only those whose rows the shared adapter knows may start from it, and tasks are not among them."""
    names = [member.plan.name for member in members]
    warm = {name for name in names if kind_of(name, users) != "task"} - {PLAIN} if plan.fleet.warm_start else set()
    return FleetCandidates(members, base, bank, PLAIN if plan.fleet.warm_start else None, warm)


def _members_of(plan: FleetPlan, rows: Path) -> tuple[Users | None, list[MemberPlan], dict[str, str]]:
    """Every member, its rows not yet read; and users who have too few.

    Raises:
        ConfigError: Two members have one name, or a key is asked before text without a prompt.
        CheckpointError: The folder of the users' rows is not a fleet's.
        DataError: Users cannot be told apart.
    """
    if plan.users is None or plan.user_knobs is None:
        return None, list(plan.tasks), {}
    common, faults = plan.user_knobs, []
    clear_rows(rows)  # they are made anew from the same rows
    users = split_users(plan.users, rows, common.training.seed, common.data, shared_kinds(plan))
    folders = users.shared | users.folders
    if double := {task.name for task in plan.tasks} & users.folders.keys():
        faults.append(f"two adapters would have one name: {', '.join(sorted(double))}; rename the task or the user")
    if KEYED in users.left_out and plan.fleet.shared != "auto":
        faults.append(f"shared = {plan.fleet.shared}: {users.left_out[KEYED]}; take plain or none")
    raise_all(ConfigError, faults, "the fleet cannot start")
    own = {"labels": sorted({*users.labels, *common.data.labels})} if users.labels else {}
    everybodys = own | {"on_bad_rows": "skip"}  # a row that cannot be used is told of its user
    changes = {PLAIN: everybodys, KEYED: everybodys | {"data_format": "auto"}}  # with a key they are of another shape
    plans = [
        replace(common, name=name, data=common.data.model_copy(update={"data": str(folder), **changes.get(name, own)}))
        for name, folder in folders.items()
    ]
    return users, [*plan.tasks, *plans], dict(users.left_out)


def pool(columns: Sequence[Mapping[str, Columns]]) -> dict[str, Any]:
    """All users' held-out rows as one set: everybody's metric on them, and how much better own adapters are."""
    rows = pooled(columns)
    if not rows:
        return {"pooled": {}, "pooled_metric": "", "pooled_gains": {}}
    metric = "accuracy" if "label_right" in rows["own"] else "loss"
    scores = {who: {metric: _score(one, metric)} for who, one in rows.items()}
    gains = {who: gain_over(who, GateConfig(), metric, scores, rows) for who in rows if who != "own"}
    known = {who: one for who, one in gains.items() if one[0] is not None}
    return {"pooled": {who: one[metric] for who, one in scores.items()}, "pooled_metric": metric, "pooled_gains": known}


def _score(rows: Columns, metric: str) -> float:
    if metric == "accuracy":
        return sum(rows["label_right"]) / len(rows["label_right"])
    return sum(rows["loss_sum"]) / sum(rows["loss_tokens"])
