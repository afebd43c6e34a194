import io

import pytest
from rich.console import Console

from benchmarks.job import Result
from benchmarks.summary import OURS, Run, needed_rate, render, summarize_bare, summarize_peer, summarize_run, warnings

PRODUCTS = {
    "before": {"tokens": 100, "seconds": {"forward": 0.2, "gradient": 0.1, "lora": 0.1, "head": 0.1, "attention": 0.5}},
    "after": {"tokens": 100, "seconds": {"forward": 0.2, "gradient": 0.1, "lora": 0.1, "head": 0.1, "attention": 0.5}},
}
ONCE = {"before": {"tokens": 100, "seconds": dict.fromkeys(("forward", "gradient", "lora", "head", "attention"), 0.1)}}


def run(rate: float, memory: int = 1 << 30, load: float = 0.0) -> Run:
    return Run(
        rate,
        rate / 2,
        memory,
        load,
        Result(
            products=PRODUCTS,
            products_once=ONCE,
            settings="as it comes",
            seconds=[9.0, 0.5],
            tokens=[9, 100],
            bare_seconds=[1.0, 0.25],
        ),
    )


def test_a_run_is_its_median_step_without_the_first_ones() -> None:
    result = Result(seconds=[9.0, 1.0, 1.0, 4.0], tokens=[1, 100, 120, 200], peak_memory_bytes=7)
    measured = summarize_run(result, skipped=1, other_load=0.0)
    assert measured.tokens_per_second == 100
    assert measured.tokens_per_second_whole == 420 / 6
    assert measured.peak_memory_bytes == 7


def test_ratios_are_taken_round_by_round() -> None:
    rounds = [
        {OURS: run(200), "other": run(100)},
        {OURS: run(100), "other": run(40)},
        {OURS: run(90), "other": run(60)},
    ]
    ratio = summarize_peer("other", rounds).ratio
    assert (ratio.low, ratio.median, ratio.high) == (1.5, 2.0, 2.5)
    assert summarize_peer(OURS, rounds).ratio.median == 1


def test_the_share_is_the_needed_time_over_the_time_taken() -> None:
    assert needed_rate(PRODUCTS) == pytest.approx(200)
    mine = summarize_peer(OURS, [{OURS: run(160)}])
    assert mine.share.median == pytest.approx(0.8)
    assert mine.share_with_attention.median == pytest.approx(1.6)
    assert mine.share_once is not None
    assert mine.share_once.median == pytest.approx(0.8)  # 100 tokens in 0.5 s of products
    assert summarize_peer("other", [{OURS: run(160), "other": run(100)}]).share_once is None


def test_memory_is_the_most_of_all_rounds() -> None:
    rounds = [{OURS: run(1, memory=5)}, {OURS: run(1, memory=9)}, {OURS: run(1, memory=7)}]
    assert summarize_peer(OURS, rounds).peak_memory_bytes == 9


def test_figures_of_small_or_disturbed_runs_are_not_to_be_quoted() -> None:
    quiet = [{OURS: run(1)}] * 3
    assert warnings(quiet, steps=8) == []
    assert "smoke test" in warnings(quiet, steps=7)[0]
    assert "smoke test" in warnings(quiet[:2], steps=8)[0]
    assert "up to 0.5 cores" in warnings([*quiet, {OURS: run(1, load=0.5)}], steps=8)[0]


def test_the_table_shows_every_peer() -> None:
    rounds = [{OURS: run(200), "other": run(100)}]
    text = io.StringIO()
    summaries = {peer: summarize_peer(peer, rounds) for peer in rounds[0]}
    Console(file=text, width=140).print(render(summaries, summarize_bare(rounds, skipped=1), 1))
    assert all(part in text.getvalue() for part in ("other", "200", "2.00", "1.00", "bare base", "400"))


def test_the_bare_base_needs_no_products_of_lora() -> None:
    bare = summarize_bare([{OURS: run(200)}], skipped=1)
    assert bare.tokens_per_second.median == 400
    assert bare.ratio.median == 0.5  # a step of half a second after one of a quarter, on the same batch
    assert bare.share.median == pytest.approx(400 / 250)  # 100 tokens in 0.4 s of forward, gradient and head
    assert bare.share_with_attention.median == pytest.approx(400 * 0.9 / 100)
    assert bare.share_once.median == pytest.approx(400 * 0.4 / 100)
