"""Tables of reports."""

from lorafleet.files.page import markdown_table


def test_no_text_breaks_a_row() -> None:
    rows = [["cat", "no table: 2 faults\n  - one | two\r\n  - three"]]
    assert markdown_table(["way", "why"], rows).splitlines() == [
        "| way | why |",
        "| --- | --- |",
        "| cat | no table: 2 faults - one \\| two - three |",
    ]
