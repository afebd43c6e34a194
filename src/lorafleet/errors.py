"""Every exception lorafleet raises on purpose.

    LorafleetError
    ├── ConfigError (ValueError)      a knob, a flag or a YAML key is wrong            exit code 2
    ├── ModelError                    the base cannot be found, loaded or adapted
    ├── DataError (ValueError)        rows that cannot be read or trained
    ├── AdapterError                  an adapter's files or tensors are wrong
    ├── CheckpointError               a run folder or checkpoint cannot be used
    ├── RegistryError                 a name, version, alias or file of the registry is not as expected
    ├── RoutingError (ValueError)     segments do not cover the batch
    ├── TrainingError                 the run cannot go on (NaN, no trained tokens)
    ├── MissingExtraError             an optional dependency is not installed
    └── Interrupted                   SIGINT or SIGTERM; a checkpoint was saved        exit code 130

A message says what is wrong, the value got, the place, and the remedy.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LorafleetError(Exception):
    """Root of all errors that lorafleet raises on purpose."""

    exit_code = 1


class ConfigError(LorafleetError, ValueError):
    """One or more knobs are wrong; the message lists every fault."""

    exit_code = 2


class ModelError(LorafleetError):
    """A base model cannot be found, loaded or adapted."""


class DataError(LorafleetError, ValueError):
    """Rows cannot be read, or nothing in them can be trained."""


class AdapterError(LorafleetError):
    """An adapter's files or tensors do not fit; the message lists every fault."""


class CheckpointError(LorafleetError):
    """A run folder or checkpoint is incomplete, damaged or belongs to another run."""


class RegistryError(LorafleetError):
    """A name, version or alias is not there or was moved, or the registry is damaged or cannot be written."""


class RoutingError(LorafleetError, ValueError):
    """The segments of a routing do not cover the batch exactly."""


class TrainingError(LorafleetError):
    """A run cannot go on."""


class MissingExtraError(LorafleetError):
    """An optional dependency is needed; the message names its install command."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra [{extra}]; install it with: pip install 'lorafleet[{extra}]'")


class Interrupted(LorafleetError):
    """The run was asked to stop and has saved a checkpoint."""

    exit_code = 130


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest candidate, or ``""`` when none is near."""
    near = get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def faults_of(error: LorafleetError) -> list[str]:
    """The single faults in an error of ``raise_all``, to be listed among others."""
    first, *several = str(error).splitlines()
    return [line.removeprefix("  - ") for line in several] or [first]


def raise_all(error: type[LorafleetError], faults: Sequence[str], what: str) -> None:
    """Raise ``error`` with all ``faults`` in one message; do nothing when there are none."""
    if len(faults) == 1:
        raise error(faults[0])
    if faults:
        raise error(f"{what}: {len(faults)} faults\n" + "\n".join(f"  - {fault}" for fault in faults))
