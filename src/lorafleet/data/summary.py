"""The report of a tokenized source, and what in it a user should look at."""

from collections import Counter
from collections.abc import Iterator, Mapping

from transformers import PreTrainedTokenizerBase

from lorafleet.config.data import DataConfig
from lorafleet.data.encode import ChatEncoder
from lorafleet.data.labels import odd_labels
from lorafleet.data.plan import Plan
from lorafleet.data.report import KEPT_REJECTIONS, DataReport, Outcome, SplitReport, decode_example, split_report
from lorafleet.data.sources import Source
from lorafleet.data.store import TokenRows

_MANY_LABELS = 1000


def summarize(
    source: Source,
    config: DataConfig,
    plan: Plan,
    encoder: ChatEncoder,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, TokenRows],
    outcomes: Mapping[str, Outcome],
) -> DataReport:
    """Count what was read, note what is odd, and decode one row."""
    reports = _split_reports(splits, outcomes)
    rejections = [rejection for outcome in outcomes.values() for rejection in outcome.rejections]
    counts = plan.label_counts.get("train") or next(iter(plan.label_counts.values()), Counter())
    warnings = [
        *encoder.warnings,
        *_source_warnings(source, splits),
        *_label_warnings(plan),
        *_row_warnings(config, plan, reports),
        *_leaks(splits),
    ]
    return DataReport(
        data=source.title,
        format=plan.shape or "none",
        task=plan.task,
        template=encoder.template.name,
        mask_strategies=dict(Counter(strategy for rows in splits.values() for strategy in rows.column("strategy"))),
        end_of_turn=encoder.end_of_turn,
        labels={label: counts[label] for label in plan.labels},
        splits=reports,
        rejections=tuple(rejections[:KEPT_REJECTIONS]),
        warnings=tuple(warnings),
        ignored=source.ignored,
        example=decode_example(next(iter(splits.values()))[0], tokenizer),
    )


def _split_reports(splits: Mapping[str, TokenRows], outcomes: Mapping[str, Outcome]) -> dict[str, SplitReport]:
    reports: dict[str, SplitReport] = {}
    for name, rows in splits.items():
        if name in outcomes:
            read, rejected = outcomes[name].read, outcomes[name].rejected
            held_out = read - rejected - sum(rows.column("first"))
        else:  # valid, held out from train
            read, rejected, held_out = sum(rows.column("first")), 0, 0
        reports[name] = split_report(rows, read=read, rejected=rejected, held_out=held_out)
    return reports


def _source_warnings(source: Source, splits: Mapping[str, TokenRows]) -> Iterator[str]:
    if "train" not in splits:
        yield f"there are no train rows, only {', '.join(splits)}: this data can be evaluated, not trained on"
    elif "valid" not in splits:
        yield "nothing is held out: the loss on rows that were not trained will not be known"
    if source.ignored:
        yield f"files that belong to no split were not read: {', '.join(source.ignored)}"


def _label_warnings(plan: Plan) -> Iterator[str]:
    if plan.task != "label":
        return
    if len(plan.labels) == 1:
        yield f"all rows have the label {plan.labels[0]!r}; there is nothing to tell apart"
    if len(plan.labels) > _MANY_LABELS:
        yield f"there are {len(plan.labels):,} labels; if they are free text, call the fields prompt and completion"
    for same in odd_labels(plan.labels):
        yield f"labels that differ only in case or white space count as different: {same}"
    train = plan.label_counts.get("train")
    for name in ("valid", "test"):
        new = sorted(set(plan.label_counts.get(name, ())) - set(train or ()))
        if train and new:
            yield f"{name} has labels that train does not have: {', '.join(map(repr, new[:10]))}"


def _row_warnings(config: DataConfig, plan: Plan, reports: Mapping[str, SplitReport]) -> Iterator[str]:
    truncated = sum(report.truncated for report in reports.values())
    used = sum(report.used for report in reports.values())
    neutralised = sum(report.neutralised for report in reports.values())
    if truncated:
        yield f"{truncated:,} of {used:,} rows are longer than max_length={config.max_length} tokens and were cut"
    if neutralised:
        remedy = "; for text that was rendered with a chat template, use messages rows" if plan.task == "text" else ""
        yield f"{neutralised:,} rows contain control tokens as text, which were kept as text{remedy}"


def _leaks(splits: Mapping[str, TokenRows]) -> Iterator[str]:
    """Rows of an evaluation split that are also trained."""
    if "train" not in splits:
        return
    trained = set(splits["train"].column("fingerprint"))
    for name in ("valid", "test"):
        if name in splits:
            rows = set(splits[name].column("fingerprint"))
            if both := len(rows & trained):
                yield f"{both:,} of {len(rows):,} different {name} rows are also in train; their scores prove little"
