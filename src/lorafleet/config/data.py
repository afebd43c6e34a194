"""The knobs of data: where rows come from, how they become tokens, which tokens are trained."""

from typing import Literal

from lorafleet.config.knob import Section, knob

RowFormat = Literal["auto", "messages", "prompt_completion", "text", "text_label", "alpaca", "sharegpt"]


class DataConfig(Section):
    """Rows of any known shape, read, checked and turned into token ids with a loss mask."""

    data: str = knob(
        ..., "A file (jsonl, json, csv, tsv, parquet), a folder with train/valid/test, or a hub id.", names=("dataset",)
    )
    data_format: RowFormat = knob("auto", "Shape of the rows; auto detects it by their fields.")
    valid_fraction: float = knob(
        0.05, "Share of train held out, seeded, when there is no valid file.", names=("val_set_size",), ge=0, lt=1
    )
    max_length: int = knob(
        1024, "Tokens kept of a row; longer rows are cut.", names=("max_seq_length", "sequence_len", "cutoff_len"), ge=8
    )
    max_rows: int | None = knob(None, "Use only the first N rows of each split.", ge=1)
    on_bad_rows: Literal["error", "skip"] = knob("error", "Stop at rows that cannot be used, or skip and count them.")
    loss_on: Literal["assistant", "completion", "all"] = knob(
        "assistant",
        "Tokens that are trained: every assistant turn, the last assistant turn only, or all tokens. "
        "Rows of plain text are trained whole.",
        switches={"assistant_only_loss": ("assistant", "all"), "completion_only_loss": ("completion", "all")},
    )
    prompt_template: str | None = knob(
        None, "Prompt of text/label rows, with {text} and {labels}; the default names the labels when they are few."
    )
    labels: list[str] = knob([], "All labels of text/label rows, where these rows may lack some of them.")
    chat_template: str | None = knob(None, "A Jinja file to use in place of the model's own chat template.")
    system_prompt: str | None = knob(None, "System turn for rows that have none.")
