"""The gate of each adapter: measured beside its rivals, let through or not, kept with the verdict."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lorafleet.comparison.quality import difference
from lorafleet.config.fleet import GateConfig
from lorafleet.data.load import Data, load_data
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.adapter import WEIGHTS, load_adapter
from lorafleet.files.adapter_tensors import adapted_modules
from lorafleet.files.atomic import json_bytes, write_bytes
from lorafleet.files.deployability import deployability
from lorafleet.fleets.gates import Evidence, compared_by, failures
from lorafleet.fleets.measure import Columns, Rivals, adapter_in_use
from lorafleet.fleets.members import FleetCandidates, FleetMember
from lorafleet.fleets.plan import FleetPlan
from lorafleet.fleets.result import Interval, MemberResult
from lorafleet.fleets.users import KEYED, PLAIN, Users, keyed_folder, kind_of
from lorafleet.registry.registry import Registry

logger = logging.getLogger(__name__)

_JUDGED = "judged.json"


class Judge:
    """Judges the adapters of a fleet whose training is over; those that were judged before an interruption stay so.

    Args:
        plan: The fleet.
        candidates: Who was trained.
        loss_model: The base with slots, all empty again.
        registry: Where adapters are kept; None for nowhere.
        users: Whose rows they are; None for tasks.
        rows: The folder of the users' rows.
    """

    def __init__(
        self,
        plan: FleetPlan,
        candidates: FleetCandidates,
        loss_model: LossModel,
        registry: Registry | None,
        users: Users | None,
        rows: Path,
    ) -> None:
        self.plan, self.candidates, self.registry, self.users, self.rows = plan, candidates, registry, users, rows
        self.base = candidates.base
        folders = [self._shared(name) for name in (PLAIN, KEYED)]
        size = plan.run.per_device_eval_batch_size
        self.rivals = Rivals(self.base, candidates.bank, loss_model, size, (folders[0], folders[1]))
        self.columns: dict[str, dict[str, Columns]] = {}
        self.versions: dict[str, str | None] = {}

    def judge(self, member: FleetMember) -> MemberResult:
        """Measure one adapter, decide, and keep it."""
        place, name = member.folder / _JUDGED, member.plan.name
        if place.exists():
            told = json.loads(place.read_text())
            self.columns[name] = told["columns"]
            known = told["result"]
            known |= {"reasons": tuple(known["reasons"]), "interval": known["interval"] and tuple(known["interval"])}
            self.versions[name] = known["version"]
            return MemberResult(**known)
        rows = member.held_out(self.plan.run.max_eval_rows)
        prod = adapter_in_use(self.registry, member, self.plan.fleet.alias, self.base)
        kind = kind_of(name, self.users)
        shares = kind == ("task" if self.users is None else "user")  # whose rows the shared adapters know
        scores, columns = self.rivals.compare(member, rows, self._keyed(member), prod, shared=shares)
        reasons = failures(member.plan.gate, self._evidence(member, scores, columns))
        self.rivals.done()
        metric = compared_by(member.plan.gate, scores["own"])
        gain, interval = gain_over(
            "shared" if "shared" in columns else "base", member.plan.gate, metric, scores, columns
        )
        result = MemberResult(
            name=name,
            kind=kind,
            trained_rows=len(member.data.train),
            measured_rows=len(rows),
            steps=self.candidates.steps[name],
            tokens=self.candidates.tokens[name],
            scores=scores,
            metric=metric,
            gain=gain,
            interval=interval,
            status="rejected" if reasons else "passed",
            reasons=tuple(reasons),
            version=self._keep(member, scores["own"], reasons),
        )
        logger.info("%s %s: %s", name, result.status, "; ".join(reasons) or "through its gate")
        self.columns[name], self.versions[name] = columns, result.version
        # On one line: a number a line would be three times as much, for every user.
        write_bytes(place, json_bytes({"result": asdict(result), "columns": columns}, indent=None))
        return result

    def _evidence(
        self, member: FleetMember, scores: Mapping[str, Mapping[str, float]], columns: Mapping[str, Columns]
    ) -> Evidence:
        adapter = load_adapter(member.folder)
        return Evidence(
            scores,
            columns,
            (member.folder / WEIGHTS).stat().st_size / 1e6,
            self.rivals.forgetting() if member.plan.gate.max_forgetting is not None else None,
            deployability(adapter.config, adapted_modules(adapter.tensors)),
        )

    def _keep(self, member: FleetMember, scores: Mapping[str, float], reasons: list[str]) -> str | None:
        """Put the adapter into the registry with its verdict, and move its alias if it passes."""
        if self.registry is None:
            return None
        parent = self.versions.get(self.candidates.first or "")  # judged before those that started from it
        why = "; ".join(reasons) or None
        version = self.registry.add(member.folder, member.plan.name, scores=scores, parent=parent, rejected=why)
        self.registry.share(version, member.folder)
        if why is None:
            self.registry.promote(version.label, self.plan.fleet.alias)
        return version.label

    def _shared(self, name: str) -> Path | None:
        found = self.candidates.outcomes.get(name) == "finished"
        return self.candidates.members[name].folder if found else None

    def _keyed(self, member: FleetMember) -> Data | None:
        """A user's test rows as the keyed shared adapter has learned to read them."""
        if self.users is None or member.plan.name not in self.users.folders or self._shared(KEYED) is None:
            return None
        folder = keyed_folder(self.users, member.plan.name, self.rows)
        return load_data(member.plan.data.model_copy(update={"data": str(folder)}), self.base.tokenizer)


def gain_over(
    rival: str,
    gate: GateConfig,
    metric: str,
    scores: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, Columns],
) -> tuple[float, Interval | None]:
    """How much better an adapter is than a rival on the same rows, positive where it is, and the interval of that."""
    sign = -1.0 if metric == "loss" else 1.0
    gain = sign * (scores["own"][metric] - scores[rival][metric])
    gap = difference(columns["own"], columns[rival], metric, chance=gate.significance)
    if gap is None:
        return gain, None
    low, high = sorted(sign * end for end in gap)
    return gain, (low, high)
