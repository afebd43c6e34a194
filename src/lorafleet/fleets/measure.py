"""Each adapter beside its rivals on the same held-out rows: the base, the shared adapters, the one now in use."""

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

_OWN, _SHARED, _KEYED, _PROD = range(4)  # slots

Columns = dict[str, list[Any]]


class Rivals:
    """Measures adapters on a base whose training is over.

    Args:
        base: The base.
        bank: Its slots, all empty.
        loss_model: The base with these slots.
        batch_size: Rows in a batch.
        shared: The folder of the shared adapter; None where there is none.
        keyed: That of the shared adapter with keys.
    """

    def __init__(
        self,
        base: Base,
        bank: LoraBank,
        loss_model: LossModel,
        batch_size: int,
        shared: Path | None = None,
        keyed: Path | None = None,
    ) -> None:
        self.base, self.bank, self.loss_model, self.batch_size = base, bank, loss_model, batch_size
        self._filled = set[int]()
        for slot, folder in ((_SHARED, shared), (_KEYED, keyed)):
            if folder is not None:
                self._fill(slot, load_adapter(folder))
        self._general: list[TokenRow] | None = None
        self._general_before = 0.0

    def take_prod(self, adapter: Adapter) -> None:
        """Let the adapter that is in use be a rival of the next one that is compared.

        Raises:
            AdapterError: It does not fit.
            ConfigError: Its targets do not fit the base.
        """
        self._fill(_PROD, adapter)

    def compare(
        self, member: FleetMember, rows: Sequence[TokenRow], keyed: Data | None, *, shared: bool
    ) -> tuple[dict[str, dict[str, float]], dict[str, Columns]]:
        """One adapter and its rivals on the same rows.

        Args:
            member: The adapter, trained.
            rows: Its held-out rows.
            keyed: The same rows with its user's key before the prompt.
            shared: Whether the shared adapters are its rivals: they know the rows of users, no others.

        Returns:
            By whom: the metrics, and each row's share in them.
        """
        self._fill(_OWN, load_adapter(member.folder))
        rivals = {"own": _OWN, "base": BASE_ONLY}
        rivals |= {"shared": _SHARED} if shared and _SHARED in self._filled else {}
        rivals |= {"prod": _PROD} if _PROD in self._filled else {}
        measured = {who: self._measure(slot, member.data, rows) for who, slot in rivals.items()}
        if keyed is not None and _KEYED in self._filled:
            measured["shared keyed"] = self._measure(_KEYED, keyed, sample(keyed.splits["test"], len(rows)))
        scores = {who: metrics for who, (metrics, _) in measured.items()}
        columns = {who: shares for who, (_, shares) in measured.items()}
        if member.data.task == "label":
            scores["majority"], columns["majority"] = _majority(member.data, rows)
        return scores, columns

    def score(self, folder: Path, member: FleetMember, rows: Sequence[TokenRow]) -> dict[str, float]:
        """The metrics of an adapter in a folder on a member's rows."""
        try:
            self._fill(_OWN, load_adapter(folder))
            return self._measure(_OWN, member.data, rows)[0]
        finally:
            self.done()

    def forgetting(self) -> float:
        """By how much the loss on a general text has risen for the adapter that was compared last, in nats a token."""
        if self._general is None:
            test = load_data(DataConfig(data=GENERAL), self.base.tokenizer).splits
            self._general = [row for split in test.values() for row in split]
            self._general_before = self._general_loss(BASE_ONLY)
        return self._general_loss(_OWN) - self._general_before

    def done(self) -> None:
        """Take the adapter that was compared last, and the one in use, out of their slots."""
        for slot in self._filled & {_OWN, _PROD}:
            self.bank.remove(slot)
            self._filled.remove(slot)

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
        self.bank.load(slot, adapter.config, adapter.tensors)
        self._filled.add(slot)
        self.bank.eval()


def adapter_in_use(registry: Registry | None, member: FleetMember, alias: str, base: Base) -> Adapter | None:
    """The adapter that a member's alias points at; None where there is none.

    None too where it is the member's own, as in a fleet that goes on after it had moved the alias.

    Raises:
        AdapterError: It is damaged, or another base's.
        RegistryError: The registry cannot be read, or files of it are missing.
    """
    if registry is None:
        return None
    name = member.plan.name
    version = next((one for one in registry.versions(name) if alias in one.aliases), None)
    if version is None or version.files.get(WEIGHTS) == sha256_file(member.folder / WEIGHTS):
        return None
    adapter = load_adapter(registry.folder(version))
    if mismatches(adapter, base):
        raise AdapterError(f"{version.label} was trained on another base or tokenizer than that of {base.name}")
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
