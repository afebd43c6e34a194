"""What a search leaves behind: the ranking, the winner's adapter, and how to train it again."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafleet.config.load import dump_sections
from lorafleet.errors import TrainingError
from lorafleet.files.atomic import write_json, write_text
from lorafleet.files.run_folder import CARD, RESULT, SETTINGS, lora_shape, model_card, provenance
from lorafleet.search.fit import configure
from lorafleet.search.keeper import adapter_folder
from lorafleet.search.objectives import DIRECTIONS
from lorafleet.search.space import in_words
from lorafleet.search.study import Record, Study
from lorafleet.search.worker import Worker

BEST = "best"


@dataclass(frozen=True)
class TuneResult:
    """The outcome of a search.

    Attributes:
        output_dir: The run folder.
        best: Folder of the best trial's adapter; with several objectives, of the best in the first one.
        best_trial: Its number.
        best_settings: Its knobs.
        objectives: What was improved.
        front: With several objectives, the trials among which to choose: no other one is better in one of them without
            being worse in another.
        trials: All trials, the best first: number, state, settings, values, metrics, the objective at each rung by
            tokens, tokens and seconds spent, and the trial whose outcome it shares where the settings mean the same.
        importances: How much each dimension has to do with being among the best in the first objective, as shares.
        before: The base's measurements on the held-out rows.
        population_size: Trials that trained together.
        tokens: Tokens that all trials processed.
        full_tokens: Tokens that all trials would have processed without stopping any.
        seconds: Wall time of the search, interruptions not counted.
    """

    output_dir: str
    best: str
    best_trial: int
    best_settings: dict[str, Any]
    objectives: list[str]
    front: list[int]
    trials: list[dict[str, Any]]
    importances: dict[str, float]
    before: dict[str, float]
    population_size: int
    tokens: int
    full_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return asdict(self)


def write_results(worker: Worker, study: Study, extra: Mapping[str, Any]) -> TuneResult:
    """Rank the trials, put the winner's adapter into ``best/`` with its settings, and write the result.

    Raises:
        TrainingError: No trial reached the full budget.
    """
    output_dir, budget = Path(worker.run.output_dir), worker.budget
    ranked = ranking(study.records, study.config.objectives[0])
    elsewhere = sum(record.state == "running" for record in ranked)
    if ranked[0].values is None and elsewhere:
        raise TrainingError(
            f"no trial has reached its end yet; {elsewhere} are still trained by others who share the storage. When "
            f"they are done, see the result with: --resume-from-checkpoint true --output-dir {output_dir}"
        )
    if ranked[0].values is None:
        raise TrainingError(
            f"none of the {len(ranked)} trials could be trained to the end; see {output_dir / 'metrics.jsonl'} for "
            "where their loss stopped being finite, and lower the learning rates"
        )
    best = ranked[0]
    runs = len(study.records) * study.config.seeds_per_trial
    result = TuneResult(
        output_dir=str(output_dir),
        best=str(output_dir / BEST),
        best_trial=best.number,
        best_settings=dict(best.notes["settings"]),
        objectives=study.config.objectives,
        front=study.front if len(study.config.objectives) > 1 else [],
        trials=[_plain(record) for record in ranked],
        importances=study.importances(places(ranked, study.config.objectives[0])),
        before=dict(extra["before"]),
        population_size=int(extra["population_size"]),
        tokens=sum(int(record.notes.get("tokens", 0)) for record in ranked),
        full_tokens=runs * budget.tokens(1.0),
        seconds=float(extra["seconds"]),
    )
    _write_best(worker, best, result)
    write_json(output_dir / RESULT, result.as_dict())
    return result


def ranking(records: Sequence[Record], objective: str) -> list[Record]:
    """Complete trials, the best first; then stopped ones, by how far they came and how well; failed ones last."""
    return sorted(records, key=lambda record: (_standing(record, objective), record.number))


def places(ranked: Sequence[Record], objective: str) -> dict[int, int]:
    """The place of each trial that has ended, 0 the best; equal trials share one."""
    ended = [record for record in ranked if record.state not in ("waiting", "running")]
    standings = list(dict.fromkeys(_standing(record, objective) for record in ended))
    return {record.number: standings.index(_standing(record, objective)) for record in ended}


def _standing(record: Record, objective: str) -> tuple[float, ...]:
    sign = -1 if DIRECTIONS[objective] == "maximize" else 1
    if record.values is not None:
        return (0, sign * record.values[0])
    if record.reported:
        last = max(record.reported)
        return (1, -last, sign * record.reported[last])
    return (2,)


def _plain(record: Record) -> dict[str, Any]:
    notes = record.notes
    return {
        "number": record.number,
        "state": record.state,
        "settings": notes.get("settings", {}),
        "values": record.values,
        "metrics": notes.get("metrics", {}),
        "runs": notes.get("runs", {}),
        "at_rungs": {str(tokens): value for tokens, value in sorted(record.reported.items())},
        "tokens": notes.get("tokens", 0),
        "seconds": notes.get("seconds", 0.0),
        "same_as": notes.get("same_as"),
    }


def _write_best(worker: Worker, best: Record, result: TuneResult) -> None:
    """The adapter of the winner's best run, with the YAML that trains it again for the full budget."""
    model, data, lora, training, run, *_ = worker.settings
    output_dir = Path(run.output_dir)
    objective, runs = result.objectives[0], best.notes["runs"]
    sign = -1 if DIRECTIONS[objective] == "maximize" else 1
    seed = int(min(runs, key=lambda one: sign * runs[one][objective]))
    folder, partial = output_dir / BEST, output_dir / f".{BEST}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(adapter_folder(Path(best.notes["output_dir"]), best.number, seed), partial)
    own_lora, own_training = configure((lora, training), result.best_settings)
    own_training = own_training.model_copy(update={"seed": seed, "max_steps": worker.budget.steps(own_training)})
    again = run.model_copy(
        update={"output_dir": f"{run.output_dir}-best", "overwrite": False, "resume_from_checkpoint": False}
    )
    write_text(partial / SETTINGS, dump_sections(model, data, own_lora, own_training, again))
    facts: dict[str, Any] = {
        "found by": f"a search over {len(result.trials)} settings",
        "settings": in_words(result.best_settings),
        "seed": seed,
    }
    card = model_card(
        title=f"{output_dir.resolve().name}: the best of {len(result.trials)} settings",
        base_name=worker.base.name,
        shape=lora_shape(own_lora),
        data=Path(data.data).name,
        metrics_before=result.before,
        metrics=dict(best.notes["metrics"]),
        facts=facts,
        made_by=provenance(),
    )
    write_text(partial / CARD, card)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
