"""What a run must find again to go on as if it had not stopped: tensors, progress, and proof of being the same run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafleet.errors import CheckpointError
from lorafleet.files.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from lorafleet.training.member import Member


class RunState:
    """Saves and restores a population in one run folder.

    Args:
        output_dir: The run folder.
        identity: Hashes and settings that decide the result; a checkpoint with others is refused.
        keep: Checkpoints to keep.
        extra: What else to keep, such as the measurements before training.
    """

    def __init__(
        self,
        output_dir: Path,
        identity: Mapping[str, Any],
        keep: int,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir, self.keep = output_dir, keep
        self.identity, self.extra = dict(identity), dict(extra or {})

    def save(self, step: int, members: Sequence[Member]) -> Path:
        """Write ``checkpoint-<step>`` of a population and delete the oldest ones."""
        tensors: dict[str, Tensor] = {}
        for member in members:
            tensors |= member.tensors()
        progress = {member.name: asdict(member.progress) for member in members}
        state = {"identity": self.identity, "extra": self.extra, "progress": progress, "step": step}
        path = save_checkpoint(self.output_dir, step, tensors, state)
        prune_checkpoints(self.output_dir, self.keep, protect={step})
        return path

    def restore(self, path: Path, members: Callable[[Mapping[str, Any]], Sequence[Member]]) -> int:
        """Continue from a checkpoint.

        Args:
            path: The checkpoint.
            members: Gives the adapters that were training then, from what ``extra`` was.

        Returns:
            Its step.

        Raises:
            CheckpointError: It is damaged, or belongs to a run with other data, base, tokenizer or settings.
        """
        tensors, state = load_checkpoint(path)
        differing = differences(state["identity"], self.identity)
        if differing:
            raise CheckpointError(
                f"{path} belongs to another run, so going on would not give its result:\n  - "
                + "\n  - ".join(differing)
                + "\nGive the settings and data of that run, or train anew with --overwrite or another --output-dir"
            )
        self.extra = dict(state["extra"])
        for member in members(self.extra):
            member.load(tensors, state["progress"][member.name])
        return int(state["step"])


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], place: str = "") -> list[str]:
    """Every setting that differs between two nested mappings, as ``place: 3 then, 2 now``."""
    found = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{place}{key}.")
        elif old != new:
            found.append(f"{place}{key}: {old!r} then, {new!r} now")
    return found
