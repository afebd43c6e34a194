"""How adapters are named: ``translate`` · ``translate:3`` · ``translate@prod`` · ``sha256:9f86d081``."""

import re
import unicodedata
from typing import NamedTuple

from lorafleet.errors import ConfigError

LONGEST = 128
_REVISION = re.compile(r"sha256:([0-9a-f]{8,64})")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class Reference(NamedTuple):
    """What a text names: a version or an alias of a name, or a revision by the beginning of its hash.

    With neither number nor alias, what the name stands for: its alias ``prod``, else its newest version that was not
    rejected.
    """

    name: str | None = None
    number: int | None = None
    alias: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.revision is not None:
            return f"sha256:{self.revision}"
        number = f":{self.number}" if self.number is not None else ""
        return f"{self.name}{number}{f'@{self.alias}' if self.alias else ''}"


def name_fault(text: str, what: str = "name") -> str | None:
    """Why a text cannot be a name, an alias or a tag; None where it can.

    Letters of any script are allowed, as keys of users are names; what paths and references are made of is not.
    """
    if len(text) > LONGEST:
        return f"{what} {text[:20]!r}… has {len(text)} characters; {LONGEST} is the most"
    if text == "sha256":
        return f"{what} 'sha256' stands for revisions; take another"
    allowed = text[:1].isalnum() or text[:1] == "_"
    allowed = allowed and all(character.isalnum() or character in "_.-+ " or _is_mark(character) for character in text)
    if allowed and text == text.strip() and text == unicodedata.normalize("NFC", text):
        return None
    return f"{what} {text!r} should begin with a letter or digit and have letters, digits, spaces and . - _ + only"


def _is_mark(character: str) -> bool:
    """Vowel signs and the like, without which many scripts cannot be written."""
    return unicodedata.category(character).startswith("M")


def parse_reference(text: str) -> Reference:
    """Read a reference.

    Raises:
        ConfigError: It is none.
    """
    if match := _REVISION.fullmatch(text):
        return Reference(revision=match[1])
    forms = "NAME, NAME:3, NAME@prod or sha256: and 8 or more hex digits"
    if text.startswith("sha256:"):
        raise ConfigError(f"{text!r} names no revision of a registry ({forms})")
    name, at, alias = text.partition("@")
    name, colon, number = name.partition(":")
    faults = [name_fault(name), name_fault(alias, "alias") if at else None]
    if colon and (at or not _VERSION.fullmatch(number)):
        faults.append("a version is a number from 1, as in NAME:3")
    if found := [fault for fault in faults if fault]:
        raise ConfigError(f"{text!r} names no adapter of a registry ({forms}): {'; '.join(found)}")
    return Reference(name, int(number) if colon else None, alias if at else None)
