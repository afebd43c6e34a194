"""``inspect_data`` shows what training would use."""

from pathlib import Path

import pytest

from lorafleet.data.run import inspect_data
from lorafleet.errors import ConfigError, DataError
from tests.tiny import tiny_base_folder


def test_inspect_data_reports_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    base = tiny_base_folder(tmp_path / "base")
    report = inspect_data(data="sample:movie_polarity", model=str(base), max_rows=40)
    assert (report.format, report.task, report.template) == ("text_label", "label", "model")
    assert {name: split.used for name, split in report.splits.items()} == {"train": 40, "valid": 40, "test": 40}
    assert report.mask_strategies == {"prefix": 120}
    assert report.example.text.endswith("»\n")
    assert (tmp_path / "cache" / "data").is_dir()


def test_inspect_data_reads_a_configuration_and_names_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    base = tiny_base_folder(tmp_path / "base", chat_template=False)
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    (tmp_path / "config.yml").write_text(f"model: {base}\ndata: {tmp_path}/rows.csv\n")
    assert inspect_data(tmp_path / "config.yml").template == "plain"
    with pytest.raises(ConfigError, match="max_lenght"):
        inspect_data(tmp_path / "config.yml", max_lenght=3)
    with pytest.raises(ConfigError, match="model"):
        inspect_data(data=str(tmp_path / "rows.csv"))
    with pytest.raises(DataError, match="there is no file or folder"):
        inspect_data(tmp_path / "config.yml", data=str(tmp_path / "absent.csv"))
