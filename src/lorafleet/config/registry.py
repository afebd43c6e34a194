"""The knobs of the registry."""

from typing import Literal

from lorafleet.config.knob import Section, knob


class RegistryConfig(Section):
    """Where adapters are kept."""

    registry: str | None = knob(
        None,
        "The registry's folder, or an object store's URL (s3://bucket/path) that fsspec knows; $LORAFLEET_REGISTRY or "
        "~/.lorafleet/registry when not given.",
    )
    registry_database: str | None = knob(
        None,
        "SQLAlchemy's URL of the registry's database, such as postgresql+psycopg://user@host/name; SQLite in the "
        "registry's folder when not given.",
    )


class AddConfig(Section):
    """Under which name an adapter is kept."""

    name: str = knob(..., "Its name: letters of any script, digits, spaces and . - _ +.")
    tags: list[str] = knob([], "Words to find it by.")
    parent: str | None = knob(None, "The version of the registry that its training went on from.")
    rejected: str | None = knob(None, "Why it does not pass. Such a version is kept, but takes no alias.")


class ListConfig(Section):
    """Which versions to list."""

    tag: str | None = knob(None, "Only versions with this tag.")


class AliasConfig(Section):
    """Which alias."""

    alias: str = knob("prod", "The alias. A name alone stands for its prod.")


class PromoteConfig(Section):
    """What the alias must be at."""

    expect: int | Literal["any", "none"] = knob(
        "any", "The version that the alias must point at now; none where it must be new. Otherwise nothing is moved."
    )


class GcConfig(Section):
    """What may be deleted."""

    keep: int | None = knob(None, "Of every name, keep this many of the newest versions; all when not given.", ge=0)
    dry_run: bool = knob(False, "Only say what would be deleted.")


class ExportConfig(Section):
    """Where versions are written."""

    output: str = knob(..., "The file to write.")


class ImportConfig(Section):
    """Under which name versions are read."""

    name: str | None = knob(None, "Another name than the file's.")
