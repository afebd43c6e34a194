"""The report of a search: what it says, that it needs nothing beside itself, and how a browser shows it."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafleet.search.report import conclusion, markdown, write_report
from lorafleet.search.result import TuneResult


def trial(number: int, r: int, alpha: float, loss: float | None, **more: Any) -> dict[str, Any]:
    rungs = {"100": 3.0 + r / 100, "300": 2.5 + r / 100} if loss else {"100": 3.5 + r / 100}
    done = {"values": [loss], "metrics": {"loss": loss}, "runs": {"42": {"loss": loss}}, "state": "complete"}
    stopped = {"values": None, "metrics": {}, "runs": {}, "state": "pruned"}
    own = {"number": number, "settings": {"r": r, "lora_alpha": alpha, "learning_rate": 1e-4 * (number + 1)}}
    cost = {"at_rungs": rungs, "tokens": 900 if loss else 100, "seconds": 61.0, "same_as": None}
    return own | cost | (done if loss else stopped) | more


@pytest.fixture
def result(tmp_path: Path) -> TuneResult:
    trials = [
        trial(3, 8, 16.0, 1.93),
        trial(0, 4, 32.0, 1.97),
        trial(5, 32, 16.0, 2.01),
        trial(6, 32, 32.0, 2.02),
        trial(1, 4, 16.0, None),
        trial(2, 16, 16.0, None),
        trial(4, 16, 32.0, None, state="fail", at_rungs={}),
    ]
    lines = [
        {"event": "step", "name": f"trial {one['number']} seed 42", "tokens": 50, "loss": 4 - 0.1 * step}
        for one in trials
        for step in range(18 if one["values"] else 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "lorafleet.yaml").write_text("r: 8\nlora_alpha: 16.0\ndata: a<b>.jsonl\n")
    return TuneResult(
        output_dir=str(tmp_path),
        best=str(tmp_path / "best"),
        best_trial=3,
        best_settings=trials[0]["settings"],
        objectives=["loss"],
        front=[],
        trials=trials,
        importances={"learning_rate": 0.7, "r": 0.2, "lora_alpha": 0.1},
        before={"loss": 2.8, "perplexity": 16.4},
        population_size=4,
        tokens=3900,
        full_tokens=6300,
        seconds=431.0,
    )


def test_the_conclusion_follows_from_the_numbers(result: TuneResult) -> None:
    assert conclusion(result) == [
        "The best of 7 settings is trial 3: r 8, lora_alpha 16, learning_rate 0.0004.",
        "Its held-out loss is 1.9300; the base's was 2.8000.",
        "The second best, trial 0, is 0.0400 behind.",
        "2 trials were stopped early, so the search took 3,900 tokens: 62% of the 6,300 that all trials would have "
        "taken. It took 7:11; at the same rate all trials to their end would have taken about 11:36.",
    ]


def test_a_difference_within_the_seeds_is_called_that(result: TuneResult) -> None:
    result.trials[0]["runs"] = {"42": {"loss": 1.90}, "43": {"loss": 1.96}}
    assert "less than the best one's own seeds differ" in " ".join(conclusion(result))


def test_several_objectives_leave_a_choice(result: TuneResult) -> None:
    for one, latency in zip(result.trials, (1.4, 1.2, 1.3, 1.1), strict=False):
        one["values"].append(latency)
    several = replace(result, objectives=["loss", "latency"], front=[6, 3, 0])
    text = " ".join(conclusion(several))
    assert "settings by loss is trial 3" in text
    assert "among the trials 3, 0, 6." in text
    rows = [line for line in markdown(several).splitlines() if "to choose from" in line]
    assert [row.split(" | ")[1] for row in rows] == ["3", "0", "6"]
    assert "| 1.9300 | 1.40 × | complete, to choose from |" in rows[0]
    assert "beaten by none" in write_report(several).read_text(encoding="utf-8")


def test_a_winner_at_an_end_is_pointed_out(result: TuneResult) -> None:
    result.best_settings["r"] = result.trials[0]["settings"]["r"] = 64
    assert "The best value of r is at the end of what was searched" in conclusion(result)[-1]


def test_the_table_has_every_trial_in_its_order(result: TuneResult) -> None:
    rows = [line for line in markdown(result).splitlines() if re.match(r"\| \d", line)]
    assert [row.split(" | ")[1] for row in rows] == ["3", "0", "5", "6", "1", "2", "4"]
    assert "| 1.9300 | complete | 900 | 1:01 |" in rows[0]
    assert "| 3.5400 when stopped | stopped early | 100 |" in rows[4]
    assert "| failed |" in rows[6]


def test_the_page_needs_nothing_beside_itself(result: TuneResult) -> None:
    page = write_report(result).read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(http", page)
    assert page.count("<svg") == 5
    assert "a&lt;b&gt;.jsonl" in page
    assert (Path(result.output_dir) / "report.md").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    driver_path = shutil.which("chromedriver")
    assert driver_path, "no chromedriver; scripts/browser installs it"
    options = webdriver.ChromeOptions()
    quiet = (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-sync",
    )
    for flag in (*quiet, "disable-component-update", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_browser_shows_all_of_it(result: TuneResult, browser: Any, width: int, height: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(write_report(result).as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert len(boxes) == 5
    assert all(0 <= left < right <= width for left, right in boxes)
    assert "1.9300" in browser.find_element("css selector", ".winner strong").text
    assert browser.find_element("css selector", "tr.best td:nth-child(2)").text == "3"
    assert browser.get_log("browser") == []
