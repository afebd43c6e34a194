"""How the registry's results are shown to people, on stdout."""

from collections.abc import Iterable, Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lorafleet.cli.tables import facts, put, size
from lorafleet.evaluation.metrics import in_figures, in_words

if TYPE_CHECKING:
    from lorafleet.files.pickled import ConvertResult
    from lorafleet.methods.combine import CombineResult
    from lorafleet.registry.archive import ExportResult
    from lorafleet.registry.difference import Difference
    from lorafleet.registry.run import Shown, Versions
    from lorafleet.registry.upkeep import GcResult, VerifyResult
    from lorafleet.registry.version import Move, Version


def add(result: "Version") -> None:
    """The version, and what to do with it."""
    verdict = f"rejected: {result.rejected}" if result.rejected else None
    put(
        f"{result.label} is revision {result.revision[:12]}, {size(result.size)}",
        *([verdict] if verdict else [f"Use it: lorafleet generate --adapter {quote(result.label)} --prompt ..."]),
    )


def list_versions(result: "Versions") -> None:
    """One line for each version."""
    table = Table("adapter", "aliases", "base", "method", "scores", "size", "added", "tags")
    for one in result.versions:
        scores = ", ".join(f"{in_words(name)} {in_figures(name, value)}" for name, value in _main(one.scores))
        table.add_row(
            Text(one.label, style="dim" if one.rejected else "bold"),
            ", ".join(one.aliases) or ("rejected" if one.rejected else ""),
            str(one.lineage.get("base")),
            str(one.lineage.get("method")),
            scores,
            size(one.size),
            one.created[:16].replace("T", " "),
            ", ".join(one.tags),
        )
    put(table)


def show(result: "Shown") -> None:
    """All that is known about a version."""
    version = result.version
    lineage = dict(version.lineage)
    deployable: Mapping[str, list[str]] = lineage.pop("deployable", {})
    put(
        facts(
            [
                ("adapter", version.label),
                ("aliases", ", ".join(version.aliases) or None),
                ("rejected", version.rejected),
                ("revision", version.revision),
                ("added", version.created),
                ("tags", ", ".join(version.tags) or None),
                *((name.replace("_", " "), value) for name, value in lineage.items()),
                *((in_words(name), in_figures(name, value)) for name, value in version.scores.items()),
                *((name, "can serve it" if not why else "; ".join(why)) for name, why in deployable.items()),
                ("size", size(version.size)),
                ("files", "\n".join(f"{digest[:12]}  {name}" for name, digest in version.files.items())),
                ("folder", result.folder),
            ]
        ),
        *(map(_moved, result.history)),
    )


def diff(result: "Difference") -> None:
    """One line for each thing that differs."""
    table = Table("", result.one, result.other)
    for pairs in (result.scores, result.settings, result.lineage):
        for name, (one, other) in pairs.items():
            table.add_row(name.replace("_", " "), _short(one), _short(other))
    counts = ", ".join(f"{count} {what}" for what, count in result.tensors.items() if count)
    apart = f"; ‖a − b‖ is {result.distance:.1%} of ‖a‖" if result.distance is not None else ""
    put(*([table] if table.rows else []), f"tensors: {counts}{apart}")
    put(f"files that differ: {', '.join(result.files)}" if result.files else "no file differs")


def promote(result: "Move") -> None:
    """From where to where."""
    put(_moved(result))


rollback = promote


def verify(result: "VerifyResult") -> None:
    """That all is well, and how much was read."""
    put(
        f"versions {result.versions}, revisions {result.revisions}, aliases {result.aliases}: all as they were written",
        f"{result.files} files, {size(result.bytes)}, were read and compared with their hashes",
        *([f"{result.unused} files belong to no revision; `lorafleet adapters gc` deletes them"] * bool(result.unused)),
    )


def gc(result: "GcResult") -> None:
    """What went."""
    verb = "would be deleted" if result.dry_run else "deleted"
    what = f"{len(result.versions)} versions, {len(result.revisions)} revisions, {result.files} files"
    put(f"{verb}: {what}, {size(result.bytes)}", *(f"  {label}" for label in result.versions))


def export_versions(result: "ExportResult") -> None:
    """The file."""
    put(f"{result.file}: {', '.join(result.versions)}, {size(result.bytes)}")


def import_versions(result: "Versions") -> None:
    """What came."""
    for version in result.versions:
        add(version)


def combine(result: "CombineResult") -> None:
    """The folder, and what is in it."""
    parts = " + ".join(f"{weight:g} · {name}" for name, weight in result.parts.items())
    put(f"{result.adapter}: {parts} by {result.combination}, rank {result.r}, {result.parameters:,} parameters")


def convert(result: "ConvertResult") -> None:
    """The folder."""
    put(f"{result.adapter}: {result.tensors} tensors; {result.left_out} of the base were left out")


def _main(scores: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    """Loss, and accuracy or another one: a line has no place for all."""
    return list(scores.items())[:2]


def _moved(move: "Move") -> str:
    before = "new" if move.before is None else f"was {move.name}:{move.before}"
    return f"{move.moved}  {move.kind}: {move.name}@{move.alias} is {move.name}:{move.after} ({before})"


def _short(value: Any) -> str:
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
