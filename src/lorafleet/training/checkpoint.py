"""What a run must find again to go on as if it had not stopped: tensors, progress, and proof of being the same run."""

from collections.abc import Mapping, Sequence
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
        members: The adapters.
        identity: Hashes and settings that decide the result; a checkpoint with others is refused.
        keep: Checkpoints to keep.
        extra: What else to keep, such as the measurements before training.
    """

    def __init__(
        self,
        output_dir: Path,
        members: Sequence[Member],
        identity: Mapping[str, Any],
        keep: int,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir, self.members, self.keep = output_dir, members, keep
        self.identity, self.extra = dict(identity), dict(extra or {})

    def save(self) -> Path:
        """Write ``checkpoint-N`` and delete the oldest ones; N is the most steps that any adapter has taken."""
        tensors: dict[str, Tensor] = {}
        for member in self.members:
            tensors |= member.tensors()
        progress = {member.name: asdict(member.progress) for member in self.members}
        state = {"identity": self.identity, "extra": self.extra, "progress": progress}
        step = max(member.progress.step for member in self.members)
        path = save_checkpoint(self.output_dir, step, tensors, state)
        prune_checkpoints(self.output_dir, self.keep, protect={step})
        return path

    def restore(self, path: Path) -> int:
        """Continue from a checkpoint; return its step.

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
        for member in self.members:
            member.load(tensors, state["progress"][member.name])
        self.extra = dict(state["extra"])
        return max(member.progress.step for member in self.members)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], place: str = "") -> list[str]:
    """Every setting that differs between two nested mappings, as ``place: saved → current``."""
    found = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{place}{key}.")
        elif old != new:
            found.append(f"{place}{key}: {old!r} in the checkpoint, {new!r} now")
    return found
