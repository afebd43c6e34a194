"""The record of a search, in an Optuna storage: which trials there are, what was chosen, reported and decided.

All trials are queued when the study is made, so that several processes that share a storage take each exactly once.
Everything that is decided is written down before it takes effect; a process that is resumed from an older checkpoint
finds its own decisions again instead of taking new ones.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.trial import TrialState

from lorafleet.config.search import SearchConfig
from lorafleet.errors import CheckpointError, ConfigError, MissingExtraError
from lorafleet.lora.layer import mix_key
from lorafleet.search.objectives import DIRECTIONS
from lorafleet.search.space import Choice, Dimension, Space, combinations
from lorafleet.training.checkpoint import differences

T = TypeVar("T")

DEFAULT_TRIALS = 20
_WRITES = 8
_PATIENCE = 5.0
"""Seconds in which a study that another process is making has to grow."""
_AMONG_BEST = 5
"""Trials that PED-ANOVA should have among the best, by its documentation in Optuna."""


@dataclass(frozen=True)
class Record:
    """A trial as the storage holds it.

    Args:
        number: Its number, from 0.
        state: waiting, running, complete, pruned or fail.
        chosen: The value of each dimension.
        values: Its objectives, where it is complete.
        reported: Its objective at each rung, by tokens.
        notes: What else was written down of it.
    """

    number: int
    state: str
    chosen: dict[str, Any]
    values: list[float] | None
    reported: dict[int, float]
    notes: dict[str, Any]


class Study:
    """One search in a storage.

    Args:
        config: How it searches.
        space: What it searches.
        url: Optuna's storage URL.
        name: Its name there.
        seed: From which, with a trial's number, that trial's sampler is seeded.
        identity: What decides its results; a study of this name with another one is refused.
        owner: Who takes trials here, among several processes that share the storage.

    Raises:
        CheckpointError: The storage holds another search of this name, or cannot be opened.
        ConfigError: The sampler cannot search this space.
    """

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        url: str,
        name: str,
        seed: int,
        identity: Mapping[str, Any],
        owner: str = "",
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.space, self.seed, self.owner = config, space, seed, owner
        self.sampler, queue = plan_trials(config, space)
        self._one_at_a_time = _lock(url)
        for attempt in range(3):  # of two processes that lay out a new database, Optuna lets one fail
            try:
                self._study, made = self._open(url, name)
                break
            except Exception as error:  # SQLAlchemy's, the database driver's, Optuna's: whatever the URL brings in
                if attempt == 2:
                    raise CheckpointError(f"cannot open the study {name!r} in {url}: {error}") from error
                time.sleep(0.5)
        if not made:
            self._wait_for_queue()
        known = self._study.user_attrs.get("identity")
        differing = differences(known, json.loads(json.dumps(identity))) if known is not None else []
        if differing:
            raise CheckpointError(
                f"{url} holds another search named {name!r}:\n  - " + "\n  - ".join(differing) + "\n"
                "Give the settings and data of that search, or choose another study_name or output_dir, or --overwrite"
            )
        if not self._study.user_attrs.get("queued"):
            self._study.set_user_attr("identity", dict(identity))
            for params in queue[len(self._study.get_trials(deepcopy=False)) :]:
                self._study.enqueue_trial(params)
            self._study.set_user_attr("queued", True)
        self._running: dict[int, optuna.Trial] = {}

    def _open(self, url: str, name: str) -> tuple[optuna.Study, bool]:
        """The study, and whether it was made here: of several processes that begin together one makes it."""
        storage, sampler = _storage(url), self._sampler(0)
        try:
            directions = [DIRECTIONS[objective] for objective in self.config.objectives]
            return optuna.create_study(study_name=name, storage=storage, directions=directions, sampler=sampler), True
        except optuna.exceptions.DuplicatedStudyError:
            return optuna.load_study(study_name=name, storage=storage, sampler=sampler), False

    def _wait_for_queue(self) -> None:
        """Wait until whoever made the study has filled its queue; if nothing comes, it died, and this process does."""
        waited, before = 0.0, -1
        while not self._study.user_attrs.get("queued") and waited < _PATIENCE:
            now = len(self._study.get_trials(deepcopy=False))
            waited, before = (0.0 if now > before else waited + 0.2), now
            time.sleep(0.2)

    # -- trials -------------------------------------------------------------------------------------------------------

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """Take the next trial from the queue: its number, and what was chosen for it; none when the queue is empty."""
        with self._one_at_a_time:
            number = self._left_behind()
            if number is None:
                # Optuna's own ask() would make a trial beyond the queue where another process was faster.
                taken = _patiently(self._study._pop_waiting_trial_id)
                number = next((t.number for t in self._study.get_trials(deepcopy=False) if t._trial_id == taken), None)
            if number is None:
                return None
            trial_id = self._id(number)
            _patiently(lambda: self._study._storage.set_trial_user_attr(trial_id, "owner", self.owner))
        return number, self.again(number)

    def _left_behind(self) -> int | None:
        """A trial whose taker died before it had written its name: under the lock, nobody else is at that point."""
        if not isinstance(self._one_at_a_time, FileLock):
            return None
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return next((trial.number for trial in running if "owner" not in trial.user_attrs), None)

    def again(self, number: int) -> dict[str, Any]:
        """Go on with a trial that was taken before; what was chosen for it then."""
        self._study.sampler = self._sampler(number)
        return self._choose(optuna.Trial(self._study, self._id(number)))

    def report(self, number: int, tokens: int, value: float) -> None:
        """Write down a trial's objective at a rung."""
        if self._is_running(number) and tokens not in self._frozen(number).intermediate_values:
            _patiently(lambda: self._trial(number).report(value, tokens))

    def note(self, number: int, key: str, value: Any) -> None:
        """Write down anything about a running trial; of one that has ended the notes stay as they are."""
        if self._is_running(number):
            _patiently(lambda: self._trial(number).set_user_attr(key, value))

    def complete(self, number: int, values: Sequence[float]) -> None:
        """A trial has reached the full budget."""
        _patiently(lambda: self._study.tell(number, list(values), skip_if_finished=True))

    def prune(self, number: int) -> None:
        """A trial was stopped early."""
        _patiently(lambda: self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True))

    def fail(self, number: int) -> None:
        """A trial's loss or gradient was not finite."""
        _patiently(lambda: self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True))

    @property
    def records(self) -> list[Record]:
        """All trials, in their order."""
        return [self._record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def record(self, number: int) -> Record:
        """One trial."""
        return self._record(self._frozen(number))

    @property
    def front(self) -> list[int]:
        """Complete trials that no other one equals in all objectives and beats in one."""
        return [trial.number for trial in self._study.best_trials]

    def importances(self, places: Mapping[int, int]) -> dict[str, float]:
        """How much each dimension has to do with being among the best; empty where that cannot be said.

        Optuna's PED-ANOVA (arXiv 2304.10255). Trials that were stopped early count too: among those that came to the
        end, a knob by which all others were stopped has one value left and would seem to matter least.

        Args:
            places: The place of each trial that has ended, 0 the best; equal trials share one.
        """
        if len(places) < 4 or len({*places.values()}) < 2:
            return {}
        trials = self._study.get_trials(deepcopy=False)
        ended = optuna.create_study(storage=optuna.storages.InMemoryStorage())
        for number, place in places.items():
            one = trials[number]
            ended.add_trial(optuna.create_trial(params=one.params, distributions=one.distributions, value=float(place)))
        best = min(0.5, max(0.1, _AMONG_BEST / len(places)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)
        try:
            return dict(optuna.importance.get_param_importances(ended, evaluator=evaluator))
        except (ValueError, RuntimeError):  # no dimension that all trials share
            return {}

    # -- Optuna -------------------------------------------------------------------------------------------------------

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = mix_key(self.seed, number) % 2**32
        if self.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(4, self._queued() // 4)))
        if self.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if self.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(4, self._queued() // 4)))
        return optuna.samplers.RandomSampler(seed=seed)

    def _queued(self) -> int:
        return self.config.n_trials or self.space.size or DEFAULT_TRIALS

    def _choose(self, trial: optuna.Trial) -> dict[str, Any]:
        self._running[trial.number] = trial
        chosen: dict[str, Any] = {}
        for dimension in self.space.dimensions:
            if self.space.is_active(dimension, chosen):
                chosen[dimension.name] = _patiently(partial(_suggest, trial, dimension))
        return chosen

    def _trial(self, number: int) -> optuna.Trial:
        if number not in self._running:
            self._running[number] = optuna.Trial(self._study, self._id(number))
        return self._running[number]

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _id(self, number: int) -> int:
        return self._frozen(number)._trial_id

    def _is_running(self, number: int) -> bool:
        return self._frozen(number).state is TrialState.RUNNING

    def _record(self, trial: optuna.trial.FrozenTrial) -> Record:
        by_name = {dimension.name: dimension for dimension in self.space.dimensions}
        return Record(
            trial.number,
            trial.state.name.lower(),
            {name: _from_name(by_name[name], value) for name, value in trial.params.items()},
            list(trial.values) if trial.state is TrialState.COMPLETE else None,
            dict(trial.intermediate_values),
            dict(trial.user_attrs),
        )


def _patiently(write: Callable[[], T]) -> T:
    """Write to a storage that others write to: of two writers that meet, SQLite refuses one at once."""
    for attempt in range(_WRITES - 1):
        try:
            return write()
        except optuna.exceptions.StorageInternalError:
            time.sleep(0.05 * 2**attempt)
    return write()


def _lock(url: str) -> AbstractContextManager[Any]:
    """Held while a trial is taken: SQLite has no row locks, so two processes could take the same one."""
    path = url.removeprefix("sqlite:///")
    return FileLock(f"{path}.lock") if path != url and path else nullcontext()


def _storage(url: str) -> str | optuna.storages.RDBStorage:
    """A storage; SQLite waits a minute for other processes that write."""
    if not url.startswith("sqlite:"):
        return url
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})


def plan_trials(config: SearchConfig, space: Space) -> tuple[str, list[dict[str, Any]]]:
    """Which sampler chooses, and what is fixed beforehand of every trial: all of it in a grid, nothing elsewhere.

    Raises:
        ConfigError: A grid over a dimension with any number of values.
        MissingExtraError: cmaes is not installed.
    """
    if config.sampler == "cmaes" and find_spec("cmaes") is None:
        raise MissingExtraError("sampler cmaes", "search")
    grid = list(combinations(space)) if space.size is not None else None
    if config.sampler == "grid" and grid is None:
        spans = [one.name for one in space.dimensions if one.domain.count is None]
        raise ConfigError(f"sampler = grid, but {', '.join(spans)} has any number of values; give lists, or steps")
    if grid is not None and (
        config.sampler == "grid"
        or (config.sampler == "auto" and (config.n_trials is None or config.n_trials >= len(grid)))
    ):
        names = [{d.name: _to_name(d, one[d.name]) for d in space.dimensions if d.name in one} for one in grid]
        return "grid", names[: config.n_trials]
    sampler = "tpe" if config.sampler == "auto" else config.sampler
    return sampler, [{} for _ in range(config.n_trials or DEFAULT_TRIALS)]


def _suggest(trial: optuna.Trial, dimension: Dimension) -> Any:
    domain = dimension.domain
    if isinstance(domain, Choice):
        return _from_name(dimension, trial.suggest_categorical(dimension.name, list(domain.names)))
    if domain.whole:
        step = int(domain.step or 1)
        return trial.suggest_int(dimension.name, int(domain.low), int(domain.high), step=step, log=domain.log)
    return trial.suggest_float(dimension.name, domain.low, domain.high, step=domain.step, log=domain.log)


def _to_name(dimension: Dimension, value: Any) -> Any:
    domain = dimension.domain
    return domain.names[domain.values.index(value)] if isinstance(domain, Choice) else value


def _from_name(dimension: Dimension, name: Any) -> Any:
    domain = dimension.domain
    return domain.values[domain.names.index(name)] if isinstance(domain, Choice) else name
