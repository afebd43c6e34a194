"""What a fleet came to."""

from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class MemberResult:
    """One adapter at its gate.

    Attributes:
        name: Its name.
        kind: ``task``, ``user``, or ``shared`` for one that was trained on everybody's rows.
        trained_rows: Rows it was trained on.
        measured_rows: Held-out rows it was measured on.
        steps: Optimizer steps.
        tokens: Tokens of the rows it was trained on.
        scores: Metrics on these rows by whom: ``own``, ``base``, ``shared``, ``shared keyed``, ``prod``, ``majority``.
        metric: By which metric it is compared.
        gain: How much better it is than the shared adapter, or than the base where there is none.
        interval: Of the gain, at the gate's significance; none for a single row.
        status: ``passed``, ``rejected``, ``failed`` in training or while it was measured, or ``left out`` for its rows.
        reasons: Why it did not pass.
        notes: What else has to be told: rivals that could not be measured, an alias that stays where it was.
        version: Its version in the registry; none where it is not kept.
    """

    name: str
    kind: str
    trained_rows: int = 0
    measured_rows: int = 0
    steps: int = 0
    tokens: int = 0
    scores: dict[str, dict[str, float]] | None = None
    metric: str = ""
    gain: float | None = None
    interval: Interval | None = None
    status: str = "passed"
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    version: str | None = None


@dataclass(frozen=True)
class Way:
    """A way to serve all tasks.

    Attributes:
        name: Which.
        scores: Each task's metric on its held-out rows; empty where the way does not take these adapters.
        parameters: Numbers that have to be kept beside the base, for all tasks together.
        bytes: Their files.
        error: Why there are no scores.
    """

    name: str
    scores: dict[str, float]
    parameters: int
    bytes: int
    error: str | None = None


@dataclass(frozen=True)
class FleetResult:
    """A whole fleet.

    Attributes:
        output_dir: The run folder.
        model: The base.
        members: Every member, in the order of the file.
        ways: Of tasks with a shared or combined adapter: every way to serve them, measured.
        pooled: For a fleet of users, by whom: the metric over all users' held-out rows.
        pooled_metric: That metric.
        pooled_gains: Over whom: how much better users' own adapters are over all rows, with its interval.
        population_size: Adapters that trained together, at most.
        tokens: Tokens of all rows trained on.
        train_seconds: Of training.
        seconds: From start to end.
    """

    output_dir: str
    model: str
    members: tuple[MemberResult, ...]
    ways: tuple[Way, ...]
    pooled: dict[str, float]
    pooled_metric: str
    pooled_gains: dict[str, tuple[float, Interval | None]]
    population_size: int
    tokens: int
    train_seconds: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)
