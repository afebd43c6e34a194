"""Each adapter beside its rivals on the same held-out rows: the base, the shared adapters, the one now in use."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.comparison.jobs import GENERAL
from lorafleet.config.data import DataConfig
from lorafleet.data.load import Data, load_data
from lorafleet.data.store import TokenRow, sample
from lorafleet.errors import AdapterError
from lorafleet.evaluation.measure import measure
from lorafleet.evaluation.metrics import majority
from lorafleet.evaluation.token_loss import LossModel, mean_loss, row_losses
from lorafleet.files.adapter import WEIGHTS, Adapter, load_adapter
from lorafleet.fleets.members import FleetMember
from lorafleet.generation.adapted import mismatches
from lorafleet.lora import BASE_ONLY, LoraBank
from lorafleet.models.digest import sha256_file
from lorafleet.models.load import Base
from lorafleet.registry.registry import Registry

logger = logging.getLogger(__name__)

_OWN, _SHARED, _KEYED, _PROD = range(4)  # slots

Columns = dict[str, list[Any]]


class Rivals:
    """Measures adapters on a base whose training is over.

    Args:
        base: The base.
        bank: Its slots, all empty.
        loss_model: The base with these slots.
        batch_size: Rows in a batch.
        shared: The folders of the shared adapters, plain and keyed; None for one that is not there.
    """

    def __init__(
        self,
        base: Base,
        bank: LoraBank,
        loss_model: LossModel,
        batch_size: int,
        shared: tuple[Path | None, Path | None] = (None, None),
    ) -> None:
        self.base, self.bank, self.loss_model, self.batch_size = base, bank, loss_model, batch_size
        self.shared = set[int]()
        for slot, folder in zip((_SHARED, _KEYED), shared, strict=True):
            if folder is not None:
                self._fill(slot, load_adapter(folder))
                self.shared.add(slot)
        self._general: list[TokenRow] | None = None
        self._general_before = 0.0

    def compare(
        self, member: FleetMember, rows: Sequence[TokenRow], keyed: Data | None, prod: Adapter | None, *, shared: bool
    ) -> tuple[dict[str, dict[str, float]], dict[str, Columns]]:
        """One adapter and its rivals on the same rows.

        Args:
            member: The adapter, trained.
            rows: Its held-out rows.
            keyed: The same rows with its user's key before the prompt.
            prod: The adapter that has its alias now.
            shared: Whether the shared adapters are its rivals: they know the rows of users, no others.

        Returns:
            By whom: the metrics, and each row's share in them.
        """
        self._fill(_OWN, load_adapter(member.folder))
        if prod is not None:
            self._fill(_PROD, prod)
        rivals = {"own": _OWN, "base": BASE_ONLY}
        rivals |= {"shared": _SHARED} if shared and _SHARED in self.shared else {}
        rivals |= {"prod": _PROD} if prod is not None else {}
        measured = {who: self._measure(slot, member.data, rows) for who, slot in rivals.items()}
        if keyed is not None and _KEYED in self.shared:
            measured["shared keyed"] = self._measure(_KEYED, keyed, sample(keyed.splits["test"], len(rows)))
        if prod is not None:
            self.bank.remove(_PROD)
        scores = {who: metrics for who, (metrics, _) in measured.items()}
        columns = {who: shares for who, (_, shares) in measured.items()}
        if member.data.task == "label":
            scores["majority"], columns["majority"] = _majority(member.data, rows)
        return scores, columns

    def score(self, folder: Path, member: FleetMember, rows: Sequence[TokenRow]) -> dict[str, float]:
        """The metrics of an adapter in a folder on a member's rows."""
        self._fill(_OWN, load_adapter(folder))
        scores, _ = self._measure(_OWN, member.data, rows)
        self.bank.remove(_OWN)
        return scores

    def forgetting(self) -> float:
        """By how much the loss on a general text has risen for the adapter that was compared last, in nats a token."""
        if self._general is None:
            test = load_data(DataConfig(data=GENERAL), self.base.tokenizer).splits
            self._general = [row for split in test.values() for row in split]
            self._general_before = self._general_loss(BASE_ONLY)
        return self._general_loss(_OWN) - self._general_before

    def done(self) -> None:
        """Take the adapter that was compared last out of its slot."""
        self.bank.remove(_OWN)

    def _general_loss(self, slot: int) -> float:
        assert self._general is not None
        return mean_loss(row_losses(self.loss_model, self._general, slot, self.batch_size))

    def _measure(self, slot: int, data: Data, rows: Sequence[TokenRow]) -> tuple[dict[str, float], Columns]:
        found: list[dict[str, Any]] = []
        scores = measure(self.base, self.loss_model, slot, data, rows, batch_size=self.batch_size, predictions=found)
        keys = [key for key in ("loss_sum", "loss_tokens", "label_right") if key in found[0]]
        return scores, {key: [one[key] for one in found] for key in keys}

    def _fill(self, slot: int, adapter: Adapter) -> None:
        self.bank.reserve([adapter.config], slot + 1)
        self.bank.add(adapter.config, slot=slot)
        self.bank.load_state_dict(slot, adapter.tensors)
        self.bank.eval()


def adapter_in_use(registry: Registry | None, member: FleetMember, alias: str, base: Base) -> Adapter | None:
    """The adapter that a member's alias points at; None where there is none, or none to compare with.

    It may be the member's own, where a fleet goes on that was killed after it had moved the alias; or another base's.
    """
    if registry is None:
        return None
    name = member.plan.name
    version = next((one for one in registry.versions(name) if alias in one.aliases), None)
    if version is None or version.files.get(WEIGHTS) == sha256_file(member.folder / WEIGHTS):
        return None
    try:
        adapter = load_adapter(registry.folder(version))
    except AdapterError as error:
        logger.warning("%s cannot be compared with: %s", version.label, error)
        return None
    if faults := mismatches(adapter, base):
        logger.warning("%s cannot be compared with: %s", version.label, faults[0])
        return None
    return adapter


def _majority(data: Data, rows: Sequence[TokenRow]) -> tuple[dict[str, float], Columns]:
    """Always answering the label that is most frequent among the training rows."""
    label, _ = majority([row.reference for row in data.train])
    right = [row.reference == label for row in rows]
    return {"accuracy": sum(right) / len(right)}, {"label_right": right}


def pooled(columns: Sequence[Mapping[str, Columns]]) -> dict[str, Columns]:
    """The rows of all members as if they were one set, for those whom every member was compared with."""
    whom = [who for who in columns[0] if all(who in one for one in columns)] if columns else []
    return {
        who: {key: [value for one in columns for value in one[who][key]] for key in columns[0][who]} for who in whom
    }
