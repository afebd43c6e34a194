"""The gate of each adapter: measured beside its rivals, let through or not, kept with the verdict."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafleet.comparison.quality import difference
from lorafleet.config.fleet import GateConfig
from lorafleet.data.load import Data, load_data
from lorafleet.errors import AdapterError, ConfigError, DataError, LorafleetError, RegistryError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.files.adapter import WEIGHTS, load_adapter
from lorafleet.files.adapter_tensors import adapted_modules
from lorafleet.files.atomic import json_bytes, write_bytes
from lorafleet.files.deployability import deployability
from lorafleet.fleets.checks import shared_kinds
from lorafleet.fleets.gates import Evidence, compared_by, failures, not_compared
from lorafleet.fleets.measure import Columns, Rivals, adapter_in_use
from lorafleet.fleets.members import FleetCandidates, FleetMember
from lorafleet.fleets.plan import FleetPlan
from lorafleet.fleets.result import Interval, MemberResult
from lorafleet.fleets.users import KEYED, PLAIN, Users, kind_of
from lorafleet.models.digest import sha256_file, sha256_json
from lorafleet.registry.registry import Registry
from lorafleet.registry.version import Version

logger = logging.getLogger(__name__)

_JUDGED = "judged.json"

Scores = Mapping[str, Mapping[str, float]]


class Judge:
    """Judges the adapters of a fleet whose training is over; those that were judged before an interruption stay so.

    Args:
        plan: The fleet.
        candidates: Who was trained.
        loss_model: The base with slots, all empty again.
        registry: Where adapters are kept; None for nowhere.
        users: Whose rows they are; None for tasks.
    """

    def __init__(
        self,
        plan: FleetPlan,
        candidates: FleetCandidates,
        loss_model: LossModel,
        registry: Registry | None,
        users: Users | None,
    ) -> None:
        self.plan, self.candidates, self.registry, self.users = plan, candidates, registry, users
        self.base = candidates.base
        finished = [name for name in (PLAIN, KEYED) if candidates.outcomes.get(name) == "finished"]
        self.shared = {name: candidates.members[name].folder for name in finished}
        size = plan.run.per_device_eval_batch_size
        folders = self.shared.get(PLAIN), self.shared.get(KEYED)
        self.rivals = Rivals(self.base, candidates.bank, loss_model, size, *folders)
        self.columns: dict[str, dict[str, Columns]] = {}
        self.versions: dict[str, str | None] = {}

    def judge(self, member: FleetMember) -> MemberResult:
        """Measure one adapter, decide, and keep it. What goes wrong with one is its result, and the others go on."""
        name = member.plan.name
        try:
            result = self._judged_before(member) or self._judged_now(member)
        except LorafleetError as error:
            logger.warning("%s cannot be judged: %s", name, error)
            return MemberResult(**self._facts(member), status="failed", reasons=(str(error),))
        finally:
            self.rivals.done()
        self.versions[name] = result.version
        return result

    def _facts(self, member: FleetMember) -> dict[str, Any]:
        """What is known of an adapter before it is measured."""
        name = member.plan.name
        return {
            "name": name,
            "kind": kind_of(name, self.users),
            "trained_rows": len(member.data.train),
            "steps": self.candidates.steps[name],
            "tokens": self.candidates.tokens[name],
        }

    def _asked(self, member: FleetMember) -> str:
        """A hash of what decides a verdict beside the adapter and its rows."""
        kept = [self.registry.location, self.plan.registry.registry_database] if self.registry else None
        return sha256_json([member.plan.gate.model_dump(mode="json"), self.plan.fleet.alias, kept])

    def _judged_before(self, member: FleetMember) -> MemberResult | None:
        """The verdict of before an interruption; None where there is none, or another was asked for."""
        place = member.folder / _JUDGED
        told = json.loads(place.read_text()) if place.exists() else {}
        if told.get("asked") != self._asked(member):
            return None
        known, columns = told["result"], told["columns"]
        for scores in known["scores"].values():  # JSON has null for NaN
            scores |= {metric: math.nan for metric, value in scores.items() if value is None}
        for shares in columns.values():
            shares |= {field: [math.nan if one is None else one for one in shares[field]] for field in shares}
        self.columns[member.plan.name] = columns
        known |= {key: tuple(known[key]) for key in ("reasons", "notes")}
        return MemberResult(**known | {"interval": known["interval"] and tuple(known["interval"])})

    def _judged_now(self, member: FleetMember) -> MemberResult:
        name, gate = member.plan.name, member.plan.gate
        rows = member.held_out(self.plan.run.max_eval_rows)
        facts, unmet = self._facts(member), dict[str, str]()
        shares = facts["kind"] == ("task" if self.users is None else "user")  # whose rows the shared adapters know
        if shares and PLAIN in shared_kinds(self.plan) and PLAIN not in self.shared:
            unmet["shared"] = self.candidates.failures.get(PLAIN, "it was left out")
        keyed = self._keyed(member, unmet)
        self._take_prod(member, unmet)
        scores, columns = self.rivals.compare(member, rows, keyed, shared=shares)
        reasons = failures(gate, self._evidence(member, scores, columns, unmet))
        metric = compared_by(gate, scores["own"])
        gain, interval = gain_over("shared" if "shared" in columns else "base", gate, metric, scores, columns)
        version, kept = self._keep(member, scores["own"], reasons)
        named = (*gate.better_than, *gate.not_worse_than)  # why these were not met is among the reasons
        notes = [not_compared(rival, why) for rival, why in unmet.items() if rival not in named]
        result = MemberResult(
            **facts,
            measured_rows=len(rows),
            scores=scores,
            metric=metric,
            gain=gain,
            interval=interval,
            status="rejected" if reasons else "passed",
            reasons=tuple(reasons),
            notes=(*notes, *kept),
            version=version,
        )
        logger.info("%s %s: %s", name, result.status, "; ".join([*reasons, *result.notes]) or "through its gate")
        self.columns[name] = columns
        told = {"asked": self._asked(member), "result": asdict(result), "columns": columns}
        # On one line: a number a line would be three times as much, for every user.
        write_bytes(member.folder / _JUDGED, json_bytes(told, indent=None))
        return result

    def _take_prod(self, member: FleetMember, unmet: dict[str, str]) -> None:
        """Let the adapter that the alias points at be a rival; one that cannot be is told of."""
        try:
            prod = adapter_in_use(self.registry, member, self.plan.fleet.alias, self.base)
            if prod is not None:
                self.rivals.take_prod(prod)
        except (AdapterError, ConfigError, RegistryError) as error:
            unmet["prod"] = str(error)

    def _evidence(
        self, member: FleetMember, scores: Scores, columns: Mapping[str, Columns], unmet: Mapping[str, str]
    ) -> Evidence:
        adapter = load_adapter(member.folder)
        return Evidence(
            scores,
            columns,
            (member.folder / WEIGHTS).stat().st_size / 1e6,
            self.rivals.forgetting() if member.plan.gate.max_forgetting is not None else None,
            deployability(adapter.config, adapted_modules(adapter.tensors)),
            unmet,
        )

    def _keep(
        self, member: FleetMember, scores: Mapping[str, float], reasons: list[str]
    ) -> tuple[str | None, tuple[str, ...]]:
        """Put the adapter into the registry with its verdict, and move its alias if it passes.

        Returns:
            Its version, and what has to be told of it.
        """
        if self.registry is None:
            return None, ()
        name, why = member.plan.name, "; ".join(reasons) or None
        if why is not None:
            for one in self.registry.versions(name):
                if one.aliases and _same_files(one, member.folder):
                    return one.label, (f"{one.label} has the same bytes and stays {', '.join(one.aliases)}",)
        # Judged before those that started from it.
        parent = self.versions.get(PLAIN) if name in self.candidates.warm else None
        version = self.registry.add(member.folder, name, scores=scores, parent=parent, rejected=why)
        self.registry.share(version, member.folder)
        if why is None:
            self.registry.promote(version.label, self.plan.fleet.alias)
        return version.label, ()

    def _keyed(self, member: FleetMember, unmet: dict[str, str]) -> Data | None:
        """A user's test rows as the keyed shared adapter has learned to read them."""
        if self.users is None or member.plan.name not in self.users.keyed or KEYED not in self.shared:
            return None
        changed = {"data": str(self.users.keyed[member.plan.name]), "data_format": "auto", "on_bad_rows": "skip"}
        wanted = len(member.data.splits[member.measured_on])
        try:
            keyed = load_data(member.plan.data.model_copy(update=changed), self.base.tokenizer)
        except DataError as error:
            unmet[KEYED] = str(error)
            return None
        if (count := len(keyed.splits["test"])) != wanted:  # a key can make a row too long
            unmet[KEYED] = f"with the key before them, {count} of {wanted} rows can be used"
            return None
        return keyed


def _same_files(version: Version, folder: Path) -> bool:
    """Whether an adapter's files are a version's, byte for byte."""
    places = {folder / path: digest for path, digest in version.files.items()}
    return all(path.is_file() and sha256_file(path) == digest for path, digest in places.items())


def gain_over(
    rival: str, gate: GateConfig, metric: str, scores: Scores, columns: Mapping[str, Columns]
) -> tuple[float | None, Interval | None]:
    """How much better an adapter is than a rival on the same rows, positive where it is, and the interval of that.

    None where a loss is no number.
    """
    sign = -1.0 if metric == "loss" else 1.0
    gain = sign * (scores["own"][metric] - scores[rival][metric])
    if not math.isfinite(gain):
        return None, None
    gap = difference(columns["own"], columns[rival], metric, chance=gate.significance)
    if gap is None:
        return gain, None
    low, high = sorted(sign * end for end in gap)
    return gain, (low, high)
