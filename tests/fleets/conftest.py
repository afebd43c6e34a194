"""What fleets on a tiny base are made of."""

from pathlib import Path

import pytest

from tests.fleets.given import user_rows, write
from tests.tiny import tiny_base_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tasks and some users."""
    folder = tmp_path_factory.mktemp("fleet")
    tiny_base_folder(folder / "base", "llama")
    write(folder / "moods.jsonl", [{"text": f"the day {i}", "label": ("good", "bad")[i % 2]} for i in range(20)])
    write(folder / "chat.jsonl", [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(12)])
    write(folder / "broken.jsonl", [{"text": "a", "label": "good"}, {"text": "b"}])
    write(folder / "users.jsonl", user_rows({"ann": "good", "bob": "bad", "cy/7": "good"}))
    return folder
