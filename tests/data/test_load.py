"""The whole way from files to tokenized splits: bad rows, held-out rows, labels, the cache and the report."""

import gzip
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lorafleet.config.data import DataConfig
from lorafleet.data.load import Data, load_data
from lorafleet.data.report import DataReport
from lorafleet.errors import ConfigError, DataError
from tests.data.chat_templates import with_template

TOKENIZER = with_template("chatml")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Data]:
    def load_it(data: Path | str, **knobs: Any) -> Data:
        return load_data(DataConfig(data=str(data), **knobs), TOKENIZER, cache_folder=tmp_path / "cache")

    return load_it


def good_row(shape: str, number: int) -> dict[str, Any]:
    question, answer = f"question {number}", f"answer {number}"
    if shape == "messages":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if shape == "sharegpt":
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    if shape == "alpaca":
        return {"instruction": question, "input": "", "output": answer}
    if shape == "prompt_completion":
        return {"prompt": question, "completion": answer}
    if shape == "text_label":
        return {"text": question, "label": ("yes", "no")[number % 2]}
    return {"text": question}


def with_content(shape: str, value: Any) -> dict[str, Any]:
    """A row whose answer (or text) is ``value``."""
    row = good_row(shape, 0)
    if shape in ("messages", "sharegpt"):
        next(iter(row.values()))[1]["content" if shape == "messages" else "value"] = value
    else:
        row[{"alpaca": "output", "prompt_completion": "completion"}.get(shape, "text")] = value
    return row


SHAPES = ["messages", "sharegpt", "alpaca", "prompt_completion", "text_label", "text"]
BAD: dict[str, tuple[Callable[[str], bytes], str]] = {
    "broken JSON": (lambda shape: json.dumps(good_row(shape, 0)).encode()[:-3], "broken JSON"),
    "cut in a text": (lambda shape: b'{"text": "broken', "broken JSON: Unterminated string starting at column 10"),
    "wrong fields": (lambda shape: b'{"foo": "x", "bar": "y"}', "wrong fields: 'foo', 'bar'"),
    "wrong type": (lambda shape: json.dumps(with_content(shape, 12)).encode(), "must be text, not the number 12"),
    "null": (lambda shape: json.dumps(with_content(shape, None)).encode(), "must be text, not null"),
    "NaN": (lambda shape: json.dumps(with_content(shape, float("nan"))).encode(), "must be text, not NaN"),
    "object": (lambda shape: json.dumps(with_content(shape, {"x": 1})).encode(), "must be text, not an object"),
    "Latin-1": (lambda shape: json.dumps(with_content(shape, "é"), ensure_ascii=False).encode("latin-1"), "not UTF-8"),
    "GBK": (lambda shape: json.dumps(with_content(shape, "你"), ensure_ascii=False).encode("gbk"), "not UTF-8"),
    "NUL": (lambda shape: json.dumps(with_content(shape, "a\x00b")).encode(), "has a NUL character at position 2"),
    "raw NUL": (lambda shape: json.dumps(with_content(shape, "a?b")).replace("?", "\x00").encode(), "a NUL character"),
    "surrogate": (lambda shape: json.dumps(with_content(shape, "x\ud800")).encode(), "half of a surrogate pair"),
    "empty line": (lambda shape: b"", "the line is empty"),
    "empty object": (lambda shape: b"{}", "the row is empty"),
    "empty text": (lambda shape: json.dumps(with_content(shape, "  ")).encode(), "is empty"),
    "not an object": (lambda shape: b"[1, 2]", "a row is an object"),
    "nesting bomb": (lambda shape: b'{"a":' * 50_000, "nested too deeply"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_bad_row_is_located_and_good_rows_beside_it_are_trained(
    load: Callable[..., Data], tmp_path: Path, shape: str
) -> None:
    lines, expected = [], []
    for number, (make, reason) in enumerate(BAD.values()):
        lines += [json.dumps(good_row(shape, number)).encode(), make(shape)]
        expected.append((f"rows.jsonl:{2 * number + 2}", reason))
    lines.append(json.dumps(good_row(shape, 99)).encode())
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))

    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert f"{len(BAD)} of {len(lines)} rows of {path} cannot be used" in message
    assert all(f"{place}: " in message for place, _ in expected[:10])
    assert f"… and {len(BAD) - 10} more" in message
    assert "--on-bad-rows skip" in message

    report = load(path, on_bad_rows="skip").report
    assert report.format == shape
    train, valid = report.splits["train"], report.splits["valid"]
    assert (train.read, train.rejected, train.used + valid.used) == (len(lines), len(BAD), len(BAD) + 1)
    assert train.read == train.used + train.rejected + train.held_out
    for (place, reason), rejection in zip(expected, report.rejections, strict=True):
        assert rejection.source == place
        assert reason in rejection.reason


@pytest.mark.parametrize("shape", SHAPES)
def test_harmless_oddities_are_read_in_every_shape(load: Callable[..., Data], tmp_path: Path, shape: str) -> None:
    rows = [json.dumps(good_row(shape, number), ensure_ascii=False) for number in range(8)]
    rows += [rows[3], json.dumps(with_content(shape, "long words " * 10_000))]
    data = b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n\r\n"
    (tmp_path / "rows.jsonl").write_bytes(data)
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("rows.jsonl", "zipped.jsonl.gz"):
        report = load(tmp_path / name, max_length=96, valid_fraction=0).report
        train = report.splits["train"]
        assert (train.read, train.used, train.rejected) == (10, 10, 0)
        assert (train.duplicates, train.truncated, train.longest) == (1, 1, 96)
        assert any("longer than max_length=96" in warning for warning in report.warnings)


def test_a_file_with_bad_rows_only_stops_even_with_skip(load: Callable[..., Data], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 3)
    with pytest.raises(
        DataError, match=r"3 of 3 rows .*\n  a.jsonl:1: broken JSON(.*\n)*No usable row is left in train"
    ):
        load(tmp_path / "a.jsonl", on_bad_rows="skip")


def test_a_split_without_rows_stops(load: Callable[..., Data], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\nhello\n")
    (tmp_path / "valid.csv").write_text("text\n")
    with pytest.raises(DataError, match=r"there are no rows in .*valid.csv"):
        load(tmp_path)


def test_rows_that_cannot_be_tokenized_are_rejected_like_others(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [good_row("messages", 1), {"messages": [{"role": "assistant", "content": "alone"}]}]
    rows.append({"messages": [turn for _ in range(30) for turn in good_row("messages", 2)["messages"]]})
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(path, max_length=24, loss_on="completion")
    assert "a.jsonl:2: there is no assistant turn after another turn" in str(caught.value)
    assert "a.jsonl:3: all trained tokens would be lost" in str(caught.value)


def on_terminal(report: DataReport) -> str:
    console = Console(width=200, file=StringIO(), record=True)
    console.print(report.render())
    return console.export_text()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_objects_on_one_line_of_a_list_are_told_apart(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [good_row("text", 1), {"text": 5}, good_row("text", 2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    report = load(tmp_path / "a.json", on_bad_rows="skip", valid_fraction=0).report
    assert report.splits["train"].used == 2
    assert [item.source for item in report.rejections] == ["a.json:1 (item 2)"]


def test_five_percent_are_held_out_the_same_rows_in_any_order(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [good_row("prompt_completion", number) for number in range(200)]
    one, two = write(tmp_path / "one.jsonl", rows), write(tmp_path / "two.jsonl", rows[::-1])
    held_out = [{row.reference for row in load(path).splits["valid"]} for path in (one, two)]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 10
    data = load(one)
    trained = {row.reference for row in data.splits["train"]}
    assert len(trained) == 190
    assert not trained & held_out[0]
    assert (data.report.splits["train"].held_out, data.report.splits["valid"].read) == (10, 10)


def test_rows_with_the_same_question_are_on_the_same_side(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n // 4}", "completion": f"a{n}"} for n in range(400)]
    data = load(write(tmp_path / "a.jsonl", rows))
    sides = [{int(row.reference[1:]) // 4 for row in data.splits[name]} for name in ("train", "valid")]
    assert not sides[0] & sides[1]
    assert len(data.splits["valid"]) == 20


def test_something_is_held_out_even_when_all_questions_or_rows_are_the_same(
    load: Callable[..., Data], tmp_path: Path
) -> None:
    for name, rows in (
        ("question", [{"prompt": "q", "completion": f"a{n}"} for n in range(40)]),
        ("row", [{"prompt": "q", "completion": "a"}] * 40),
    ):
        data = load(write(tmp_path / f"{name}.jsonl", rows))
        assert (len(data.splits["train"]), len(data.splits["valid"])) == (38, 2)


def test_one_row_cannot_be_held_out(load: Callable[..., Data], tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [good_row("text", 1)]))
    assert list(data.splits) == ["train"]
    assert any("nothing is held out" in warning for warning in data.report.warnings)


def test_test_rows_are_never_trained_on_and_copies_in_train_are_named(
    load: Callable[..., Data], tmp_path: Path
) -> None:
    rows = [good_row("prompt_completion", number) for number in range(60)]
    write(tmp_path / "set" / "train.jsonl", rows[:50])
    write(tmp_path / "set" / "test.jsonl", rows[48:])
    data = load(tmp_path / "set", valid_fraction=0.1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 45, "valid": 5, "test": 12}
    assert {row.source.split(":")[0] for row in data.splits["train"]} == {"train.jsonl"}
    assert any("different test rows are also in train" in warning for warning in data.report.warnings)


def test_a_folder_with_test_only_can_be_evaluated(load: Callable[..., Data], tmp_path: Path) -> None:
    write(tmp_path / "set" / "test.jsonl", [good_row("text", 1), good_row("text", 2)])
    data = load(tmp_path / "set")
    assert list(data.splits) == ["test"]
    assert any("can be evaluated, not trained on" in warning for warning in data.report.warnings)


def test_labels_become_a_task(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [{"text": f"text {n} with {{labels}} and {{braces}}", "label": n % 3} for n in range(30)]
    data = load(write(tmp_path / "a.jsonl", rows), valid_fraction=0)
    assert (data.task, data.labels, data.report.labels) == ("label", ("0", "1", "2"), {"0": 10, "1": 10, "2": 10})
    row = data.splits["train"][4]
    prompt = TOKENIZER.decode(row.input_ids[: row.prompt_length])
    assert "one of these labels: 0, 1, 2.\n\nText: text 4 with {labels} and {braces}<|im_end|>" in prompt
    assert row.reference == "1"
    assert tuple(row.input_ids[row.loss_mask].tolist()) == data.label_ids[1]
    assert data.label_ids[1][-1] in data.stop_ids


def test_labels_that_no_row_has(load: Callable[..., Data], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t{n}", "label": "good"} for n in range(10)])
    data = load(path, labels=["fair", "bad"])
    row = data.splits["train"][0]
    assert (data.labels, len(data.label_ids)) == (("bad", "fair", "good"), 3)
    assert "labels: bad, fair, good." in TOKENIZER.decode(row.input_ids[: row.prompt_length])


def test_many_labels_are_not_listed_and_templates_replace_the_prompt(load: Callable[..., Data], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t{n}", "label": f"label-{n % 21}"} for n in range(42)])
    row = load(path).splits["train"][0]
    assert "label-" not in TOKENIZER.decode(row.input_ids[: row.prompt_length])
    row = load(path, prompt_template="{labels} -> {text}?").splits["train"][0]
    assert TOKENIZER.decode(row.input_ids).startswith("<|im_start|>user\nlabel-0, label-1, label-10")


@pytest.mark.parametrize("labels", [["--1", "2"], ["²", "1"], ["9" * 5000, "1"], ["-", "1"]])
def test_labels_of_odd_characters_are_sorted_as_text(
    load: Callable[..., Data], tmp_path: Path, labels: list[str]
) -> None:
    rows = [{"text": f"t{n}", "label": labels[n % 2]} for n in range(6)]
    assert load(write(tmp_path / "a.jsonl", rows), max_length=8000).labels == tuple(sorted(labels))


def test_train_decides_what_the_rows_are(load: Callable[..., Data], tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", [good_row("text_label", n) for n in range(20)])
    write(tmp_path / "set" / "test.jsonl", [good_row("text", n) for n in range(40)])
    data = load(tmp_path / "set" / "train.jsonl")
    assert data.task == "label"
    with pytest.raises(DataError, match=r"40 of 60 rows .* cannot be used:\n  test\.jsonl:1: wrong fields: 'text'"):
        load(tmp_path / "set")


def test_labels_are_not_dropped_unnoticed(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [good_row("text", n) for n in range(6)] + [good_row("text_label", n) for n in range(5)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"5 of 11 .*\n  a\.jsonl:7: a label, where most rows have text alone"):
        load(path)
    assert load(path, data_format="text", valid_fraction=0).report.splits["train"].used == 11
    assert load(write(tmp_path / "null.jsonl", [row | {"label": None} for row in rows[:6]])).task == "text"


def test_labels_that_look_wrong_are_warned_about(load: Callable[..., Data], tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", [{"text": f"t{n}", "label": ("Yes", "yes")[n % 2]} for n in range(10)])
    write(tmp_path / "set" / "test.jsonl", [{"text": "t", "label": "maybe"}])
    warnings = "\n".join(load(tmp_path / "set").report.warnings)
    assert "labels that differ only in case or white space count as different: 'Yes' / 'yes'" in warnings
    assert "test has labels that train does not have: 'maybe'" in warnings


@pytest.mark.parametrize(
    ("shape", "knobs", "reason"),
    [
        ("text_label", {"prompt_template": "no place"}, "has no {text}"),
        ("text_label", {"prompt_template": "{txt}"}, "{txt}; only {text} and {labels} are filled in; did you mean"),
        ("text", {"prompt_template": "{text}"}, "prompt_template is for text/label rows"),
        ("text", {"system_prompt": "s"}, "system_prompt is for conversations"),
        ("messages", {"labels": ["a"]}, "labels is for text/label rows"),
        ("messages", {"chat_template": "nowhere.jinja"}, "chat_template = 'nowhere.jinja' cannot be read"),
        ("messages", {"chat_template": "{folder}/bad.jinja"}, "cannot be used"),
        ("messages", {"chat_template": "{folder}/refuses.jinja"}, "cannot be used: .*never this"),
    ],
)
def test_knobs_that_do_not_fit_the_rows(
    load: Callable[..., Data], tmp_path: Path, shape: str, knobs: dict[str, Any], reason: str
) -> None:
    (tmp_path / "bad.jinja").write_text("{% for x in %}")
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('never this') }}")
    knobs = {key: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for key, v in knobs.items()}
    with pytest.raises(ConfigError, match=reason):
        load(write(tmp_path / "a.jsonl", [good_row(shape, n) for n in range(4)]), **knobs)


def test_a_chat_template_file_replaces_the_models(load: Callable[..., Data], tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    path = write(tmp_path / "a.jsonl", [good_row("messages", 1)])
    data = load(path, chat_template=str(tmp_path / "mine.jinja"))
    assert TOKENIZER.decode(data.splits["train"][0].input_ids) == "[user] question 1[assistant] answer 1<|im_end|>"
    assert data.chat_template == (tmp_path / "mine.jinja").read_text()


def test_max_rows_and_a_named_format(load: Callable[..., Data], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [good_row("text_label", n) for n in range(50)])
    assert load(path, max_rows=20).report.splits["train"].read == 20
    data = load(path, data_format="text", valid_fraction=0)
    assert (data.task, data.labels) == ("text", ())
    row = data.splits["train"][0]
    assert TOKENIZER.decode(row.input_ids) == "question 0<|im_end|>"
    assert (row.prompt_length, row.reference, row.loss_mask.tolist()[:2]) == (0, "", [False, True])


def test_answers_and_references_reach_the_row(load: Callable[..., Data], tmp_path: Path) -> None:
    rows = [{"prompt": "q", "references": ["a", "b"]}, {"prompt": "q", "completion": "a", "answer": 3}]
    first, second = load(write(tmp_path / "a.jsonl", rows), valid_fraction=0).splits["train"]
    assert (first.reference, first.references, first.answer) == ("a", ("a", "b"), "a\nb")
    assert (second.reference, second.references, second.answer) == ("a", (), "3")


def test_rows_are_read_only_views_with_lengths(load: Callable[..., Data], tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [good_row("messages", n) for n in range(1500)]))
    rows = data.splits["train"]
    assert rows[-1].source == rows[len(rows) - 1].source
    assert [row.source for row in rows[3:5]] == [rows[3].source, rows[4].source]
    assert rows.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert rows.trained.tolist() == [row.loss_mask.sum() for row in rows]
    assert (rows[0].input_ids.dtype, rows[0].loss_mask.dtype) == (np.int32, np.bool_)
    with pytest.raises(IndexError, match="row 1425 of 1425"):
        rows[1425]
    with pytest.raises(ValueError, match="read-only"):
        rows[0].input_ids[0] = 1


def test_the_cache_is_used_until_something_changes(load: Callable[..., Data], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [good_row("messages", n) for n in range(10)])
    first = load(path)
    (folder,) = (tmp_path / "cache").iterdir()
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    again = load(path)
    assert (again.data_hash, again.report, again.labels) == (first.data_hash, first.report, first.labels)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    assert load(path, max_length=24).data_hash != first.data_hash
    write(path, [good_row("messages", n) for n in range(11)])
    assert load(path).data_hash != first.data_hash
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "gone"])
def test_a_damaged_cache_is_made_again(load: Callable[..., Data], tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.jsonl", [good_row("messages", n) for n in range(10)])
    first = load(path)
    (folder,) = (tmp_path / "cache").iterdir()
    rows = folder / "train.arrow"
    content = rows.read_bytes()
    rows.unlink()  # the first result still maps the old file
    if damage == "flip":
        rows.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "cut":
        rows.write_bytes(content[:-10])
    elif damage == "manifest":
        rows.write_bytes(content)
        (folder / "manifest.json").write_text("{")
    again = load(path)
    assert again.data_hash == first.data_hash
    assert rows.read_bytes() == content


def test_bad_rows_leave_nothing_behind(load: Callable[..., Data], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": 1}])
    with pytest.raises(DataError):
        load(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [good_row("text", 1)])
    with pytest.raises(DataError, match=r"cannot write tokenized rows to .*LORAFLEET_CACHE"):
        load_data(DataConfig(data=str(path)), TOKENIZER, cache_folder=path / "inside a file")


def test_the_report_shows_the_trained_span_and_cannot_command_the_terminal(
    load: Callable[..., Data], tmp_path: Path
) -> None:
    evil = {"prompt": "red \x1b[31m and [bold]markup[/bold]", "completion": "fine <|im_end|> yes"}
    report = load(write(tmp_path / "a.jsonl", [evil, {"prompt": 5}]), on_bad_rows="skip", valid_fraction=0).report
    assert "assistant\n«fine <|im_end|> yes<|im_end|>»\n" in report.example.text
    shown = on_terminal(report)
    assert "«fine <|im_end|> yes<|im_end|>»" in shown
    assert "red \\x1b[31m and [bold]markup[/bold]" in shown
    assert "\x1b" not in shown
    assert "1 rejected:\n  a.jsonl:2: wrong fields: 'prompt'" in shown
    assert "1 rows contain control tokens as text" in shown.replace("\n", " ")
    whole = json.loads(json.dumps(report.as_dict()))
    train = whole["splits"]["train"]
    assert (train["read"], train["used"], train["rejected"], train["neutralised"]) == (2, 1, 1, 1)
    assert train["trained_share"] == round(train["trained_tokens"] / train["tokens"], 6)
    assert whole["rejections"][0]["source"] == "a.jsonl:2"


def test_a_long_example_is_shortened(load: Callable[..., Data], tmp_path: Path) -> None:
    turns = [turn for n in range(60) for turn in good_row("messages", n)["messages"]]
    turns[1] = {"role": "assistant", "content": "long " * 2000}
    report = load(write(tmp_path / "a.jsonl", [{"messages": turns}]), max_length=100_000).report
    assert len(report.example.text) < 4000
    assert report.example.text.count("«") == report.example.text.count("»")
    assert "characters) …" in report.example.text
