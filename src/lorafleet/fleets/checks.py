"""What no fleet can do, found before anything trains."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lorafleet.config.fleet import OF_LABELS, GateConfig
from lorafleet.errors import ConfigError, faults_of
from lorafleet.fleets.members import FleetMember
from lorafleet.fleets.plan import FleetPlan, MemberPlan
from lorafleet.fleets.users import KEYED, PLAIN, ROWS
from lorafleet.lora.targets import find_saved, find_targets
from lorafleet.search.fit import fit_faults

_OF_USERS = {"auto": (PLAIN, KEYED), "both": (PLAIN, KEYED), "plain": (PLAIN,), "keyed": (KEYED,), "none": ()}


def shared_kinds(plan: FleetPlan) -> tuple[str, ...]:
    """Which adapters of everybody's rows a fleet trains."""
    if plan.users is not None:
        return _OF_USERS[plan.fleet.shared]
    return (PLAIN,) if plan.fleet.shared == "plain" else ()


def structure_faults(plan: FleetPlan) -> list[str]:
    """What in the file contradicts itself."""
    shared, faults = shared_kinds(plan), []
    if plan.users is None and plan.fleet.shared not in ("auto", "none", "plain"):
        faults.append(f"shared = {plan.fleet.shared!r} is for users; tasks have shared = plain, on their mixture")
    if plan.users is not None and plan.fleet.combine:
        faults.append("combine is for tasks; give users' adapters to `lorafleet adapters combine`")
    if reserved := sorted(task.name for task in plan.tasks if task.name.lower() in (PLAIN, KEYED)):
        faults.append(f"a task cannot be called {', '.join(reserved)}; that is an adapter of all rows")
    if plan.fleet.warm_start and (plan.users is None or PLAIN not in shared):
        faults.append("warm_start needs users, and a shared adapter of theirs: shared = plain or both")
    return faults + _gate_faults(plan) + _source_faults(plan)


def _gate_faults(plan: FleetPlan) -> list[str]:
    """Gates that ask for a shared adapter which has not learned the rows of those who stand at them."""
    whose = plan.tasks if plan.users is None else (plan.user_knobs,)
    faults = []
    for one in filter(None, (*plan.tasks, plan.user_knobs)):
        if "shared" not in (*one.gate.better_than, *one.gate.not_worse_than):
            continue
        if one not in whose:
            faults.append(f"{one.name}: the gate names shared, which learns the users' rows; name others in its gate")
        elif PLAIN not in shared_kinds(plan):
            faults.append(f"{one.name}: the gate names shared, which is not trained; set shared: plain, or name others")
    return faults


def _source_faults(plan: FleetPlan) -> list[str]:
    """Rows that lie where the fleet writes the rows of its users."""
    if plan.users is None:
        return []
    rows = Path(plan.run.output_dir, ROWS)
    sources = [plan.users.data, *(task.data.data for task in plan.tasks)]
    return [
        f"data = {data!r} lies in {rows}, which a fleet of users makes anew; move it, or choose another output_dir"
        for data in sources
        if Path(data).expanduser().resolve().is_relative_to(rows.resolve())
    ]


def shape_faults(model: nn.Module, plans: Sequence[MemberPlan]) -> list[str]:
    """Adapters that do not fit the base, or not beside each other on it. The meta device suffices."""
    shapes: dict[str, MemberPlan] = {}
    for plan in plans:  # users are many and alike: one of each shape
        shapes.setdefault(plan.lora.model_dump_json(), plan)
    faults, fitting = list[str](), list[MemberPlan]()
    for plan in shapes.values():
        found = fit_faults(model, [plan.lora])
        faults += found
        fitting += [] if found else [plan]
    for plan in fitting:
        faults += _saved_faults(model, plan, fitting)
    return list(dict.fromkeys(faults))


def _saved_faults(model: nn.Module, plan: MemberPlan, others: Sequence[MemberPlan]) -> list[str]:
    """Modules that one adapter has whole and another adapts: on one base a module is one or the other."""
    if not plan.lora.modules_to_save:
        return []
    try:
        saved = find_saved(model, plan.lora)
    except ConfigError as error:
        return faults_of(error)
    return [
        f"{path} is in modules_to_save of {plan.name} and among the target_modules of {other.name}; give both the "
        "same, or train them in two fleets"
        for path in saved
        for other in others
        if any(f"{target}.".startswith(f"{path}.") for target in find_targets(model, other.lora))
    ]


def metric_faults(members: Sequence[FleetMember]) -> list[str]:
    """Gates that compare by labels which rows do not have."""
    names = [one.plan.name for one in members if _asks_labels(one.plan.gate) and one.data.task != "label"]
    whose = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    fault = f"{whose}: the gate asks for accuracy or macro_f1, which rows without labels have not; ask for loss"
    return [fault] if names else []


def _asks_labels(gate: GateConfig) -> bool:
    return gate.metric == "accuracy" or bool(OF_LABELS & {*gate.at_least, *gate.at_most})
