"""Several workers share the trials of one study; each trial is trained exactly once, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from lorafleet.search.run import tune
from tests.search.test_run import settings
from tests.training.test_resume import make_place

COMMAND = "import json, sys; from lorafleet.search.run import tune; tune(json.loads(sys.argv[1]))"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("workers"))


def shared(place: Path, output: str, **knobs: Any) -> dict[str, Any]:
    own = {"workers": 2, "population_size": 2, "space": {"learning_rate": [1e-3, 1e-2], "r": [1, 2, 4]}}
    return settings(place, output, **own | {"max_eval_rows": 4} | knobs)


LONG = {"max_steps": 300}
"""Trials so long that the worker that starts first has not trained them all when the other one comes."""


def first_steps(output_dir: Path) -> Counter[str]:
    """How often each run took its first step, over all logs."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return Counter(event["name"] for event in events if event["event"] == "step" and event["step"] == 1)


def check_once(output_dir: Path) -> None:
    study = optuna.load_study(study_name=output_dir.name, storage=f"sqlite:///{output_dir / 'study.db'}")
    assert [trial.number for trial in study.trials] == list(range(6))
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    # The one that starts later may find nothing left, but it has looked.
    assert all(list((output_dir / "workers" / str(number)).glob("checkpoint-*")) for number in range(2))
    assert first_steps(output_dir) == {f"trial {number} seed 42": 1 for number in range(6)}
    assert (output_dir / "best" / "adapter_model.safetensors").exists()


def start(knobs: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", COMMAND, json.dumps(knobs)], stderr=subprocess.PIPE)


def wait_for_steps(output_dir: Path, number: int) -> psutil.Process:
    """Wait until a worker has taken a step; return its process."""
    log = output_dir / "workers" / str(number) / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    for process in psutil.process_iter(["open_files"]):
        if any(one.path == str(log) for one in process.info["open_files"] or ()):
            return process
    raise AssertionError(f"worker {number} took no step")


@pytest.mark.slow
def test_two_workers_train_every_trial_once_though_one_is_killed(place: Path) -> None:
    command = start(shared(place, "killed", **LONG))
    wait_for_steps(place / "killed", 1).send_signal(signal.SIGKILL)
    _, errors = command.communicate(timeout=240)
    assert command.returncode == 0, errors.decode()
    assert b"died (exit code -9); starting it again" in errors
    check_once(place / "killed")


@pytest.mark.slow
def test_workers_that_are_stopped_go_on_where_they_were(place: Path) -> None:
    command = start(shared(place, "stopped", **LONG))
    wait_for_steps(place / "stopped", 0)
    wait_for_steps(place / "stopped", 1)
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=240)
    assert command.returncode == 1
    assert b"go on with: --resume-from-checkpoint true" in errors
    tune(shared(place, "stopped", resume_from_checkpoint=True, **LONG))
    check_once(place / "stopped")


@pytest.mark.slow
def test_two_searches_share_a_storage(place: Path) -> None:
    knobs = {"workers": 1, "storage": f"sqlite:///{place / 'common.db'}", "study_name": "common"}
    commands = [start(shared(place, name, **knobs)) for name in ("first", "second")]
    for command in commands:
        _, errors = command.communicate(timeout=240)
        assert command.returncode == 0 or b"still trained by others" in errors, errors.decode()
    results = [tune(shared(place, name, resume_from_checkpoint=True, **knobs)) for name in ("first", "second")]
    assert results[0].trials == results[1].trials
    taken = first_steps(place / "first") + first_steps(place / "second")
    assert taken == {f"trial {number} seed 42": 1 for number in range(6)}


@pytest.mark.slow  # needs the extra [ray]
def test_tasks_of_a_ray_cluster_of_two_nodes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [Path(__file__).parents[2], *sys.path])))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address)
        tune(shared(place, "ray", backend="ray"))
    finally:
        ray.shutdown()
        cluster.shutdown()
    check_once(place / "ray")
