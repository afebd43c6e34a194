"""The adapters of trials that have reached the full budget, in ``trials/``."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from lorafleet.config.data import DataConfig
from lorafleet.config.search import SearchConfig
from lorafleet.config.training import RunConfig
from lorafleet.data.load import Data
from lorafleet.files.manifest import MANIFEST
from lorafleet.lora import LoraBank
from lorafleet.methods.method import Method
from lorafleet.models.load import Base
from lorafleet.search.objectives import DIRECTIONS
from lorafleet.search.trials import run_name
from lorafleet.training.member import Member
from lorafleet.training.result import write_trained

TRIALS = "trials"


def adapter_folder(output_dir: Path, number: int, seed: int) -> Path:
    """The folder of one run's adapter."""
    return output_dir / TRIALS / run_name(number, seed).replace(" ", "-")


class TrialKeeper:
    """Writes the adapters of runs that have reached the full budget into ``trials/``.

    Where one adapter is all that is asked for, a worse one than the best so far is not written, and the best takes the
    place of the one before.
    """

    def __init__(
        self, base: Base, bank: LoraBank, data: Data, data_config: DataConfig, run: RunConfig, search: SearchConfig
    ) -> None:
        self.base, self.bank, self.data, self.data_config = base, bank, data, data_config
        self.output_dir, self.objective = Path(run.output_dir), search.objectives[0]
        # Others who share the trials might be reading or writing an adapter that is to go.
        alone = search.workers == 1 and search.storage is None
        self.one = alone and not search.keep_trials and search.seeds_per_trial == 1 and len(search.objectives) == 1

    def keep(self, number: int, member: Member, metrics: Mapping[str, float]) -> None:
        """Write a member's adapter, if it may be wanted."""
        folder = adapter_folder(self.output_dir, number, member.config.seed)
        others = {place: value for place, value in self._kept().items() if self.one and place != folder}
        if any(not self._better(metrics[self.objective], value) for value in others.values()):
            return
        config = self.bank.configs[member.slot]
        assert config is not None
        method = Method("lora", "lora", config, member.config)
        write_trained(folder, self.base, member, method, self.data, self.data_config, metrics)
        for other in others:
            shutil.rmtree(other)

    def _kept(self) -> dict[Path, float]:
        manifests = self.output_dir.glob(f"{TRIALS}/*/{MANIFEST}")
        return {m.parent: json.loads(m.read_text())["metadata"]["metrics"][self.objective] for m in manifests}

    def _better(self, value: float, than: float) -> bool:
        return value > than if DIRECTIONS[self.objective] == "maximize" else value < than
