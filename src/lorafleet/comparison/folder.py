"""The folder of a comparison, which one call begins and others go on with."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafleet.comparison.jobs import Settings
from lorafleet.config.compare import MethodsConfig
from lorafleet.config.knob import Section
from lorafleet.config.yaml_text import dump_mapping
from lorafleet.errors import CheckpointError
from lorafleet.files.atomic import write_json, write_text
from lorafleet.files.run_folder import SETTINGS, locked, provenance
from lorafleet.models.digest import sha256_json
from lorafleet.training.checkpoint import differences

METHODS, RESULTS, IDENTITY = "methods", "results.json", "compare.json"


def slug(name: str) -> str:
    """A method's words as the name of a folder: readable, and another for other words."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
    return f"{plain}-{sha256_json(name)[:8]}"


@contextmanager
def open_comparison(output_dir: Path, settings: Settings, methods: MethodsConfig, data_hash: str) -> Iterator[Path]:
    """Take the folder for the length of a ``with`` block; what another call has measured in it is gone on with.

    Args:
        output_dir: The folder.
        settings: The comparison's.
        methods: Which methods this call measures.
        data_hash: Of the rows.

    Raises:
        CheckpointError: It holds a comparison with other settings, or something else; another process is using it; or
            it cannot be written.
    """
    run = settings[5]
    identity = _identity(settings) | {"rows": data_hash}
    known = output_dir / IDENTITY
    if output_dir.is_file():
        raise CheckpointError(f"{output_dir} is a file; output_dir is a folder")
    if not known.exists() and (output_dir / METHODS).exists() | (output_dir / SETTINGS).exists():
        raise CheckpointError(f"{output_dir} holds another run; give another --output-dir")
    if known.exists() and not run.overwrite:
        differing = differences(json.loads(known.read_text(encoding="utf-8")), identity)
        if differing:
            raise CheckpointError(
                f"the comparison in {output_dir} has other settings, so its rows could not stand beside new ones:\n  - "
                + "\n  - ".join(differing)
                + "\nGive the same, or --overwrite to begin anew, or another --output-dir"
            )
    with locked(output_dir):
        if known.exists() and run.overwrite:
            shutil.rmtree(output_dir / METHODS, ignore_errors=True)
            for name in (IDENTITY, RESULTS, "report.md", "report.html"):
                (output_dir / name).unlink(missing_ok=True)
        write_json(known, identity)
        write_text(output_dir / SETTINGS, dump_mapping(_given((*settings, methods))))
        write_json(output_dir / "provenance.json", provenance())
        yield output_dir


def _given(settings: Sequence[Section]) -> dict[str, Any]:
    """The knobs that were given, to be given again; what a method has of its own where nobody says stays unsaid."""
    given: dict[str, Any] = {}
    for section in settings:
        given |= section.model_dump(mode="json", exclude_unset=True, exclude={"overwrite", "resume_from_checkpoint"})
    return given


def _identity(settings: Settings) -> dict[str, Any]:
    """What has to be the same for rows of one table: all but which methods there are, and what decides no number."""
    model, data, lora, training, validation, run, own = settings
    return {
        "model": model.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "lora": lora.model_dump(mode="json", exclude_unset=True),
        "training": training.model_dump(mode="json", exclude_unset=True),
        "validation": validation.model_dump(mode="json"),
        "run": run.model_dump(mode="json", include={"max_eval_rows", "num_threads", "gradient_checkpointing"}),
        "comparison": own.model_dump(mode="json"),
    }
