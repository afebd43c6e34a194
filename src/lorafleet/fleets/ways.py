"""Ways to serve several tasks, in one table: an adapter for each, one on the mixture, or their adapters combined."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafleet.errors import LorafleetError
from lorafleet.files.adapter import WEIGHTS, load_adapter
from lorafleet.fleets.measure import Rivals
from lorafleet.fleets.members import FleetMember
from lorafleet.fleets.result import MemberResult, Way
from lorafleet.methods.combine import combine

logger = logging.getLogger(__name__)

SEPARATE, SHARED, BASE = "separate adapters", "one shared adapter", "the base"


def compare_ways(
    members: Sequence[FleetMember],
    judged: Mapping[str, MemberResult],
    rivals: Rivals,
    shared: Path | None,
    combinations: Sequence[str],
    most_rows: int,
    folder: Path,
) -> list[Way]:
    """Every way's scores on the held-out rows of every task that was trained.

    Args:
        members: The tasks whose adapters are there.
        judged: What they came to.
        rivals: Measures combined adapters.
        shared: The folder of the adapter on their mixture; None where there is none.
        combinations: Of :class:`~lorafleet.config.combine.CombineConfig`.
        most_rows: Of each task that are measured.
        folder: Where combined adapters go.
    """
    separate = [member.folder for member in members]
    found = [_known(BASE, "base", members, judged, []), _known(SEPARATE, "own", members, judged, separate)]
    if shared is not None:
        found.append(_known(SHARED, "shared", members, judged, [shared]))
    return found + [_combined(how, members, judged, rivals, most_rows, folder / how) for how in combinations]


def _known(
    name: str,
    who: str,
    members: Sequence[FleetMember],
    judged: Mapping[str, MemberResult],
    kept: Sequence[Path],
) -> Way:
    """A way that was measured at the gates; ``kept`` are the folders of the adapters that have to be kept for it."""
    results = {member.plan.name: judged[member.plan.name] for member in members}
    scores = {task: (one.scores or {})[who][one.metric] for task, one in results.items()}
    sizes = [_size(one) for one in kept]
    return Way(name, scores, sum(count for count, _ in sizes), sum(size for _, size in sizes))


def _combined(
    how: str,
    members: Sequence[FleetMember],
    judged: Mapping[str, MemberResult],
    rivals: Rivals,
    most_rows: int,
    folder: Path,
) -> Way:
    name, scores = f"combined by {how}", dict[str, float]()
    try:
        if folder.is_dir():  # of adapters that may have been trained again since, or left by a process that was killed
            shutil.rmtree(folder)
        combine([str(member.folder) for member in members], combination=how, output_dir=str(folder))
        for member in members:
            metrics = rivals.score(folder, member, member.held_out(most_rows))
            scores[member.plan.name] = metrics[judged[member.plan.name].metric]
    except LorafleetError as error:
        logger.warning("%s: %s", name, error)
        return Way(name, {}, 0, 0, str(error))
    return Way(name, scores, *_size(folder))


def _size(folder: Path) -> tuple[int, int]:
    """Numbers and bytes of an adapter."""
    tensors = load_adapter(folder).tensors.values()
    return sum(tensor.numel() for tensor in tensors), (folder / WEIGHTS).stat().st_size
