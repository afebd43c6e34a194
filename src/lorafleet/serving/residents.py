"""The adapters that are in memory: each in a slot, the one unused for longest leaving first."""

from collections import OrderedDict
from dataclasses import dataclass

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, ConfigError, raise_all
from lorafleet.files.adapter import load_adapter
from lorafleet.generation.adapted import mismatches
from lorafleet.lora import LoraBank, without_absent
from lorafleet.models.load import Base
from lorafleet.serving.source import Found


@dataclass
class Resident:
    """An adapter in memory.

    Attributes:
        label: ``name:3`` of the registry, or a folder.
        slot: Where it is.
        bytes: Its size.
        users: Requests that it is answering.
        leaving: Whether another adapter waits for its slot, so that it takes no more requests.
    """

    label: str
    slot: int
    bytes: int
    users: int = 0
    leaving: bool = False


class Residents:
    """Adapters in the slots of one base.

    Args:
        base: The base; its linear layers get the slots.
        max_adapters: How many slots.
        check_base: Refuse adapters that were trained on another base or tokenizer.
    """

    def __init__(self, base: Base, max_adapters: int, *, check_base: bool) -> None:
        self.base, self.check_base = base, check_base
        self.bank = LoraBank(base.model, max_adapters)
        # All linear layers from the start, so that those that read the same input are computed together.
        self.bank.reserve([LoraConfig(r=1)], max_adapters)
        self.bank.eval()
        self._by_key: OrderedDict[str, Resident] = OrderedDict()
        self._scales: dict[str, float] = {}

    def list(self) -> list[Resident]:
        """All of them, the one unused for longest first."""
        return list(self._by_key.values())

    def __contains__(self, found: Found) -> bool:
        return found.key in self._by_key

    def bring_in(self, found: Found) -> Resident | None:
        """The adapter in its slot, loaded if it is not there; none where it cannot be used before others are done.

        Raises:
            AdapterError: It is damaged, does not fit, or was trained on another base.
        """
        resident = self._by_key.get(found.key)
        if resident is None:
            slot = self._free_slot()
            if slot is None:
                next(iter(self._by_key.values())).leaving = True
                return None
            resident = self._by_key[found.key] = self._load(found, slot)
        if resident.leaving:
            return None
        self._by_key.move_to_end(found.key)
        return resident

    def evict(self, found: Found) -> None:
        """Take an adapter out of memory, if it is there.

        Raises:
            AdapterError: It is answering requests.
        """
        resident = self._by_key.get(found.key)
        if resident is not None and resident.users:
            raise AdapterError(f"{found.label} is answering {resident.users} requests; evict it when they are done")
        if resident is not None:
            self._empty(found.key)

    def release(self, found: Found) -> None:
        """Note that a request of this adapter has left."""
        self._by_key[found.key].users -= 1

    def scale(self, key: str, factor: float) -> bool:
        """Multiply what an adapter adds by ``factor``, now and when it comes in later; whether that is a change."""
        changed = self._scales.get(key, 1.0) != factor
        self._scales[key] = factor
        if key in self._by_key:
            self.bank.rescale(self._by_key[key].slot, factor)
        return changed

    def _free_slot(self) -> int | None:
        """A slot that holds nothing, emptied of the adapter unused for longest if need be."""
        if None in self.bank.configs:
            return self.bank.configs.index(None)
        idle = next((key for key, resident in self._by_key.items() if not resident.users), None)
        return None if idle is None else self._empty(idle)

    def _empty(self, key: str) -> int:
        slot = self._by_key.pop(key).slot
        self.bank.remove(slot)
        return slot

    def _load(self, found: Found, slot: int) -> Resident:
        adapter = load_adapter(found.folder)
        if self.check_base:
            faults = mismatches(adapter, self.base)
            raise_all(AdapterError, faults, f"the adapter {found.label} was not trained on this base")
        try:
            self.bank.load(slot, adapter.config, adapter.tensors)
        except ConfigError:  # written for a family of models: some names are of other members
            self.bank.load(slot, without_absent(self.base.model, adapter.config), adapter.tensors)
        if (factor := self._scales.get(found.key, 1.0)) != 1:
            self.bank.rescale(slot, factor)
        return Resident(found.label, slot, sum(tensor.nbytes for tensor in adapter.tensors.values()))
