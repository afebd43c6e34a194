"""From what the peers measured to the figures that are quoted: parity, rates, ratios, memory, shares."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.job import Result

OURS = "lorafleet"
BARE = "the bare base in lorafleet's loop: no LoRA, no optimizer"
PARITY_LIMIT = 1e-3
NEEDED_BARE = ("forward", "gradient", "head")
NEEDED = (*NEEDED_BARE, "lora")
QUIET = 0.1
"""Cores that others may use while a figure is taken; a tenth of a core does not show in a ratio."""


@dataclass(frozen=True)
class Parity:
    """Whether peers that saw identical batches had the same losses.

    Args:
        losses: Of each peer, step by step.
        relative: Of each peer but lorafleet, the largest |difference| / |its loss| over the steps.
    """

    losses: dict[str, list[float]]
    relative: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every step of every peer agrees."""
        return all(value <= PARITY_LIMIT for value in self.relative.values())


def compare_losses(losses: dict[str, list[float]]) -> Parity:
    """Hold each peer's losses against lorafleet's.

    Raises:
        ValueError: The peers did not report the same number of losses.
    """
    ours = losses[OURS]
    relative = {}
    for peer, theirs in losses.items():
        if peer == OURS:
            continue
        if len(theirs) != len(ours):
            raise ValueError(f"{peer} reported {len(theirs)} losses, {OURS} {len(ours)}")
        differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        # max() passes over a NaN, which is no agreement.
        relative[peer] = max(differences) if all(d == d for d in differences) else float("inf")
    return Parity(losses, relative)


@dataclass(frozen=True)
class Run:
    """One peer in one round.

    Args:
        tokens_per_second: Real tokens, the median over the timed steps.
        tokens_per_second_whole: All tokens of the timed steps over all their seconds.
        peak_memory_bytes: Of the process.
        other_load: Cores that other programs kept busy meanwhile, or that the hypervisor took.
        result: As the peer reported it.
    """

    tokens_per_second: float
    tokens_per_second_whole: float
    peak_memory_bytes: int
    other_load: float
    result: Result


def summarize_run(result: Result, skipped: int, other_load: float) -> Run:
    """Rates of one run, without its first steps."""
    seconds, tokens = result.seconds[skipped:], result.tokens[skipped:]
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    return Run(median(rates), sum(tokens) / sum(seconds), result.peak_memory_bytes, other_load, result)


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """Median, and the range where there is one."""
        if self.low == self.high:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(values: list[float]) -> Spread:
    """Median, least and most of some values."""
    return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class PeerSummary:
    """A peer over all rounds.

    Args:
        tokens_per_second: Real tokens, median step of each round.
        ratio: lorafleet's rate over this peer's, round by round.
        tokens_per_second_whole: Real tokens, all timed steps of each round together.
        ratio_whole: The same ratio of those.
        peak_memory_bytes: Most over the rounds.
        share: Time that the matrix products of all tokens need at the best kernel, over the time that the peer took.
        share_with_attention: The same, with attention's products counted as needed too.
        share_once: The latter for the products that are left when what a batch's rows begin with is computed once;
            None for peers, which compute it for each row.
    """

    tokens_per_second: Spread
    ratio: Spread
    tokens_per_second_whole: Spread
    ratio_whole: Spread
    peak_memory_bytes: int
    share: Spread
    share_with_attention: Spread
    share_once: Spread | None


def needed_rate(products: dict[str, Any], groups: tuple[str, ...] = NEEDED) -> float:
    """Real tokens per second if nothing but the matrix products ran: before and after the run together."""
    tokens: int = sum(need["tokens"] for need in products.values())
    seconds: float = sum(need["seconds"][group] for need in products.values() for group in groups)
    return tokens / seconds


def summarize_peer(peer: str, rounds: list[dict[str, Run]]) -> PeerSummary:
    """Bring the rounds of one peer together; ratios and shares are taken within each round."""
    runs, ours = [one[peer] for one in rounds], [one[OURS] for one in rounds]
    pairs = list(zip(ours, runs, strict=True))
    return PeerSummary(
        tokens_per_second=spread([run.tokens_per_second for run in runs]),
        ratio=spread([our.tokens_per_second / run.tokens_per_second for our, run in pairs]),
        tokens_per_second_whole=spread([run.tokens_per_second_whole for run in runs]),
        ratio_whole=spread([our.tokens_per_second_whole / run.tokens_per_second_whole for our, run in pairs]),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        share=spread([run.tokens_per_second / needed_rate(our.result.products) for our, run in pairs]),
        share_with_attention=spread(
            [run.tokens_per_second / needed_rate(our.result.products, (*NEEDED, "attention")) for our, run in pairs]
        ),
        share_once=None
        if peer != OURS
        else spread(
            [our.tokens_per_second / needed_rate(our.result.products_once, (*NEEDED, "attention")) for our in ours]
        ),
    )


@dataclass(frozen=True)
class BareSummary:
    """The frozen base alone, forward and backward, on the batches of lorafleet's timed steps.

    Args:
        tokens_per_second: Real tokens, median step of each round.
        ratio: lorafleet's rate over this one: of each pair of steps on the same batch, the median of each round.
        share: Time that the products of all tokens need at the best kernel, LoRA's not among them, over the time taken.
        share_with_attention: The same, with attention's products counted as needed too.
        share_once: The latter for the products that are left when what a batch's rows begin with is computed once.
    """

    tokens_per_second: Spread
    ratio: Spread
    share: Spread
    share_with_attention: Spread
    share_once: Spread


def summarize_bare(rounds: list[dict[str, Run]], skipped: int) -> BareSummary:
    """How much of its time the base itself spends in matrix products: what is left is no loop's to save."""
    results = [one[OURS].result for one in rounds]
    rates = [
        median(t / s for t, s in zip(result.tokens[skipped:], result.bare_seconds[skipped:], strict=True))
        for result in results
    ]
    ratios = [
        median(bare / s for bare, s in zip(result.bare_seconds[skipped:], result.seconds[skipped:], strict=True))
        for result in results
    ]
    with_attention = (*NEEDED_BARE, "attention")
    needs = (("products", NEEDED_BARE), ("products", with_attention), ("products_once", with_attention))
    shares = [
        spread([rate / needed_rate(getattr(one, kind), groups) for rate, one in zip(rates, results, strict=True)])
        for kind, groups in needs
    ]
    return BareSummary(spread(rates), spread(ratios), *shares)


def warnings(rounds: list[dict[str, Run]], steps: int) -> list[str]:
    """Why the figures of a run should not be quoted."""
    found = []
    if len(rounds) < 3 or steps < 8:
        found.append(f"{len(rounds)} rounds of {steps} steps are a smoke test; quote 3 rounds of 8 steps or more")
    busiest = max(run.other_load for one in rounds for run in one.values())
    if busiest > QUIET:
        found.append(f"other programs used up to {busiest:.1f} cores meanwhile; run it again on a quiet machine")
    return found


def as_json(rounds: list[dict[str, Run]], summaries: dict[str, PeerSummary], bare: BareSummary) -> dict[str, Any]:
    """Plain values of the throughput phase."""
    return {
        "rounds": [{peer: asdict(run) for peer, run in one.items()} for one in rounds],
        "summary": {peer: asdict(summary) for peer, summary in summaries.items()},
        "bare": asdict(bare),
        "needed_tokens_per_second": [needed_rate(one[OURS].result.products) for one in rounds],
    }


def render(summaries: dict[str, PeerSummary], bare: BareSummary, rounds: int) -> Table:
    """The table that the command prints."""
    table = Table(title=f"Training throughput: median of {rounds} rounds (least–most)")
    rates = ("real tokens/s", "lorafleet is faster ×", "whole tokens/s", "whole ×", "peak GiB")
    columns = (*rates, "share, all tokens", "share, computed")
    table.add_column("peer")
    for column in columns:
        table.add_column(column, justify="right")
    for peer, one in summaries.items():
        table.add_row(
            peer,
            one.tokens_per_second.text(0),
            "" if peer == OURS else one.ratio.text(2),
            one.tokens_per_second_whole.text(0),
            "" if peer == OURS else one.ratio_whole.text(2),
            f"{one.peak_memory_bytes / 2**30:.2f}",
            *_shares(one),
        )
    table.add_section()
    table.add_row(BARE, bare.tokens_per_second.text(0), bare.ratio.text(2), "", "", "", *_shares(bare))
    table.caption = (
        "real tokens/s: padding not counted, median step; whole: all timed steps together. share, all tokens: time "
        "that the matrix products of all real tokens need at the best kernel, over the time taken; after the slash "
        "with attention's products. share, computed: with these, and what a batch's rows begin with counted once."
    )
    return table


def _shares(one: PeerSummary | BareSummary) -> tuple[str, str]:
    once = "" if one.share_once is None else one.share_once.text(2)
    return f"{one.share.text(2)} / {one.share_with_attention.median:.2f}", once
