import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import benchmarks.train
from benchmarks.job import IGNORED, Job, Result, write_json
from benchmarks.peers import lorafleet_loop, peft_trainer
from benchmarks.process import BenchmarkError, run_module
from benchmarks.summary import OURS, compare_losses
from benchmarks.train import PEERS, main
from tests.benchmarks.jobs import tiny_job, write_rows


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {OURS: lorafleet_loop.run(tiny_job()), "peft + Trainer": peft_trainer.run(tiny_job())}


def losses(results: dict[str, Result]) -> dict[str, list[float]]:
    return {peer: result.losses for peer, result in results.items()}


def real_tokens(job: Job) -> list[int]:
    return [sum(len(job.rows[i]["input_ids"]) for i in batch) for batch in job.batches]


def test_peers_see_the_same_batches_in_the_same_order(results: dict[str, Result]) -> None:
    for result in results.values():
        assert result.tokens == real_tokens(tiny_job())
        assert len(result.seconds) == len(result.losses) == 5


def test_peers_have_the_same_losses_while_they_learn(results: dict[str, Result]) -> None:
    parity = compare_losses(losses(results))
    assert parity.passed
    assert max(parity.relative.values()) < 1e-4
    ours = results[OURS].losses
    repeated = lorafleet_loop.run(tiny_job(rows=tiny_job().rows[:4] * 5)).losses
    assert repeated[-1] < 0.95 * repeated[0], "the steps change nothing, so equal losses say nothing"
    assert all(math.isfinite(loss) for loss in ours)


def unmask_one_prompt(job: Job) -> dict[str, Any]:
    rows = [dict(row) for row in job.rows]
    rows[9]["labels"] = [rows[9]["input_ids"][i] if i else IGNORED for i in range(len(rows[9]["labels"]))]
    return {"rows": rows}


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(unmask_one_prompt, id="a prompt is trained"),
        pytest.param(lambda job: {"rows": job.rows[4:8] + job.rows[:4] + job.rows[8:]}, id="another order"),
        pytest.param(lambda job: {"learning_rate": job.learning_rate * 2}, id="another learning rate"),
        pytest.param(lambda job: {"warmup_steps": 0}, id="another schedule"),
    ],
)
def test_a_loop_that_computes_something_else_fails(results: dict[str, Result], wrong: Any) -> None:
    changed = lorafleet_loop.run(tiny_job(**wrong(tiny_job())))
    assert not compare_losses(losses(results) | {OURS: changed.losses}).passed


@pytest.mark.parametrize(("factor", "passed"), [(1 + 5e-4, True), (1 + 2e-3, False), (1 - 2e-3, False)])
def test_the_limit_is_a_thousandth_of_the_loss(factor: float, passed: bool) -> None:
    assert compare_losses({OURS: [2.0, 3.0 * factor], "other": [2.0, 3.0]}).passed is passed


def test_nan_is_no_agreement() -> None:
    assert not compare_losses({OURS: [2.0, math.nan], "other": [2.0, 3.0]}).passed
    assert not compare_losses({OURS: [2.0, 3.0], "other": [math.nan, 3.0]}).passed


def test_missing_losses_are_no_agreement() -> None:
    with pytest.raises(ValueError, match="other reported 1 losses, lorafleet 2"):
        compare_losses({OURS: [2.0, 3.0], "other": [2.0]})


@pytest.mark.slow
def test_every_peer_may_batch_as_it_likes_in_throughput() -> None:
    job = tiny_job(phase="throughput", products=True, steps=5, skipped=1)
    ours = lorafleet_loop.run(job)
    theirs = peft_trainer.run(job)
    assert ours.tokens != real_tokens(job)
    assert theirs.tokens != real_tokens(job)
    assert sum(ours.tokens) == sum(theirs.tokens) == sum(real_tokens(job))
    for need in (ours.products["before"], ours.products["after"]):
        assert all(seconds > 0 for seconds in need["seconds"].values())
    assert len(ours.bare_seconds) == job.steps
    assert ours.peak_memory_bytes > 0 < theirs.peak_memory_bytes


def test_a_job_survives_json(tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", tiny_job())
    assert Job(**json.loads((tmp_path / "job.json").read_text())) == tiny_job()


def test_the_command_stops_where_the_losses_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(peer: str, module: str, job: Job, folder: Path, threads: int) -> tuple[dict[str, Any], float]:
        return {"losses": [2.0 if peer == OURS else 2.1] * job.steps}, 0.0

    monkeypatch.setattr(benchmarks.train, "run_module", fake)
    monkeypatch.setattr(benchmarks.train, "require_peers", lambda: None)
    monkeypatch.setattr(benchmarks.train, "machine_facts", dict)
    data = write_rows(tmp_path / "train.jsonl", 30)
    output = tmp_path / "result.json"
    arguments = ["--data", str(data), "--model", tiny_job().model, "--parity-steps", "2", "--output", str(output)]
    answer = CliRunner().invoke(main, arguments)
    assert answer.exit_code == 1
    assert "losses differ from lorafleet's by more than 0.001" in answer.stderr
    assert not output.exists()


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.train, "find_spec", lambda name: None)
    answer = CliRunner().invoke(main, ["--data", str(tmp_path)])
    assert answer.exit_code == 1
    assert "pip install 'lorafleet[bench]'" in answer.stderr


def test_data_is_required_and_has_to_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.train, "require_peers", lambda: None)
    monkeypatch.setattr(benchmarks.train, "machine_facts", dict)
    assert "Missing option '--data'" in CliRunner().invoke(main, []).stderr
    answer = CliRunner().invoke(main, ["--data", str(tmp_path / "none.jsonl")])
    assert answer.exit_code == 1
    assert "none.jsonl does not exist" in answer.stderr


def test_a_peer_that_fails_is_named_with_its_output(tmp_path: Path) -> None:
    job = tiny_job(model=str(tmp_path / "no model"))
    with pytest.raises(BenchmarkError, match=r"(?s)lorafleet failed with exit code 1.*no model"):
        run_module(OURS, "lorafleet_loop", job, tmp_path, 1)


@pytest.mark.slow  # needs the extra [bench], and half a minute to import it in each process
def test_the_whole_command(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", 64)
    sizes = ["--parity-steps", "3", "--rounds", "2", "--steps", "2", "--warmup", "1", "--threads", "1"]
    output = tmp_path / "result.json"
    answer = CliRunner().invoke(
        main,
        ["--data", str(data), "--model", tiny_job().model, "--output", str(output), *sizes],
        catch_exceptions=False,
    )
    assert answer.exit_code == 0
    assert "not to be quoted: 2 rounds of 2 steps are a smoke test" in answer.stdout
    assert all(peer in answer.stdout for peer in PEERS)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["parity"]["passed"]
    assert [list(one) for one in report["rounds"]] == [list(PEERS), [*list(PEERS)[1:], OURS]]
    assert str(tmp_path) not in json.dumps(report)
