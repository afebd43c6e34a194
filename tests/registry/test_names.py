"""Which words are names, and what references name."""

import pytest

from lorafleet.errors import ConfigError
from lorafleet.registry.names import LONGEST, Reference, name_fault, parse_reference


@pytest.mark.parametrize(
    "name", ["a", "reviews-v2", "user 17", "苏轼", "Żółw", "हिन्दी", "เพื่อน", "a.b_c+d", "x" * LONGEST]
)
def test_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".hidden",
        "-flag",
        "a/b",
        "..",
        "a\\b",
        "a:b",
        "a@b",
        "a\nb",
        "a\0b",
        " a",
        "a ",
        "x" * (LONGEST + 1),
        "e\u0301",
        "\u0301e",
        "sha256",
    ],
)
def test_words_that_are_no_names(name: str) -> None:
    assert (name_fault(name, "user") or "").startswith("user ")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("reviews", Reference("reviews")),
        ("reviews:12", Reference("reviews", 12)),
        ("苏轼@prod", Reference("苏轼", alias="prod")),
        ("sha256:0123456789ab", Reference(revision="0123456789ab")),
    ],
)
def test_references_are_read_and_written(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference
    assert str(reference) == text


@pytest.mark.parametrize(
    "text", ["a:0", "a:x", "a:-1", "a:1@prod", "a@", "a:", "sha256:12", "sha256:xyzxyzxyz", "a@b@c"]
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ConfigError, match="names no (adapter|revision) of a registry"):
        parse_reference(text)
