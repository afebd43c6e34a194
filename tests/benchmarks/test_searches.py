"""The benchmarks of populations and searches run to their end on a tiny base, and stop where the peers differ."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import benchmarks.full
import benchmarks.population
import benchmarks.tune
from benchmarks.job import IGNORED
from benchmarks.population import ONE_BY_ONE, PEFT, TOGETHER
from benchmarks.process import BenchmarkError
from tests.tiny import tiny_base_folder
from tests.training.test_resume import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("searches"))


def split_rows(place: Path) -> Path:
    """The rows as a folder with held-out ones."""
    rows, folder = (place / "rows.jsonl").read_text().splitlines(keepends=True), place / "rows"
    folder.mkdir(exist_ok=True)
    for name, part in (("train", 2 * rows[4:]), ("valid", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


def run(command: Any, *arguments: str) -> str:
    found = CliRunner().invoke(command, [*arguments, "--threads", "1"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


ROWS = [
    {"input_ids": list(range(10 * i, 10 * i + 10)), "labels": [IGNORED] * 8 + [10 * i + 8, 10 * i + 9]}
    for i in range(100)
]


@pytest.mark.parametrize("equal", [True, False])
def test_ragged_rows_are_as_long_on_average(equal: bool) -> None:
    case = benchmarks.population._case(ROWS, 16, equal, 4, 3)
    lengths = [[len(row["input_ids"]) for row in rows] for rows in case.rows]
    assert all(sum(column) == 4 * 16 for column in zip(*lengths, strict=True))
    assert (len({n for row in lengths for n in row}) == 1) == equal
    assert case.timed_tokens(1) == 2 * 4 * 16
    assert all(row["input_ids"][-1] % 10 == 9 and row["labels"][-1] != IGNORED for rows in case.rows for row in rows)
    assert case.trained_share == pytest.approx(0.2, abs=0.1)


def test_losses_that_differ_are_an_error() -> None:
    case = benchmarks.population._case(ROWS, 16, True, 2, 1)
    found = {way: [{"losses": [2.0, 3.0]}] for way in (TOGETHER, ONE_BY_ONE)} | {PEFT: [{"losses": [2.0, 3.1]}]}
    with pytest.raises(BenchmarkError, match=r"16 equal: losses of peft \+ Trainer, one by one differ by 3\.\de-02"):
        benchmarks.population._check_losses(found, [case])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_population_is_measured_in_three_ways(place: Path) -> None:
    output = place / "population.json"
    sizes = ("--adapters", "2", "--tokens", "8", "--rounds", "1", "--steps", "1")
    base, rows = str(place / "base"), str(place / "rows.jsonl")
    printed = run(benchmarks.population.main, "--model", base, "--data", rows, *sizes, "--output", str(output))
    assert "8 ragged" in printed
    assert "not to be quoted: 1 rounds are a smoke test" in printed
    found = json.loads(output.read_text())
    assert found["cases"] == ["8 equal", "8 ragged"]
    assert all(one["median"] > 0 for ways in found["together_is_faster"].values() for one in ways)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_is_measured_against_the_loop(place: Path) -> None:
    output = place / "tune.json"
    sizes = ("--steps", "8", "--eval-rows", "4", "--seeds", "1", "--peer-settings", "1")
    base = str(tiny_base_folder(place / "wide", hidden_size=64))  # wide enough for the grid's r = 32
    data = str(split_rows(place))
    printed = run(benchmarks.tune.main, "--model", base, "--data", data, *sizes, "--output", str(output))
    assert "not to be quoted: 1 seeds are a smoke test" in printed
    (seed,) = json.loads(output.read_text())["seeds"]
    assert len(seed["losses"]) == 16
    assert 0 <= seed["regret"] <= 5
    assert seed["tokens"] < seed["full_tokens"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_full_fine_tuning_is_measured_against_trainer(place: Path) -> None:
    output = place / "full.json"
    sizes = ("--steps", "8", "--eval-rows", "4", "--seeds", "1", "--rates", "1e-4,1e-3")
    base, data = str(place / "base"), str(split_rows(place))
    printed = run(benchmarks.full.main, "--model", base, "--data", data, *sizes, "--output", str(output))
    assert "each at its best" in printed and "not to be quoted: 1 seeds are a smoke test" in printed
    ours, theirs = json.loads(output.read_text())["losses"].values()
    assert list(ours) == list(theirs) == ["0.0001", "0.001"]
    for rate, (loss,) in ours.items():
        assert theirs[rate] == [pytest.approx(loss, rel=1e-4)]
    assert ours["0.001"] < ours["0.0001"]
