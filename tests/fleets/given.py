"""Settings, tasks and users of the fleets on a tiny base, and their rows."""

import json
from pathlib import Path
from typing import Any

from lorafleet.fleets.result import FleetResult, MemberResult

KNOBS = {"r": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_steps": 3}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def user_rows(moods: dict[str, str], count: int = 6) -> list[dict[str, Any]]:
    return [{"user": user, "text": f"the day {i}", "label": mood} for user, mood in moods.items() for i in range(count)]


def settings(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    top = {"model": str(place / "base"), "output_dir": str(place / name), "registry": str(place / name / "registry")}
    return top | {"defaults": KNOBS, "population_size": 2} | changes


def tasks(place: Path) -> dict[str, Any]:
    return {
        "moods": {"data": str(place / "moods.jsonl"), "valid_fraction": 0.2},
        "chat": {"data": str(place / "chat.jsonl"), "valid_fraction": 0.2, "r": 4, "seed": 7},
        "broken": {"data": str(place / "broken.jsonl"), "valid_fraction": 0.2},
    }


def by_name(result: FleetResult) -> dict[str, MemberResult]:
    return {one.name: one for one in result.members}
