"""Check a written model against what it was made from: by its logits and by its bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafleet.errors import AdapterError
from lorafleet.export.unwrap import digest
from lorafleet.models.load import Base

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest max|Δ| / max|logit| between merged and unmerged, by the coarser of written and computing precision; times the
adapter's effect where that is above 1.

``W0 + ΔW`` is rounded once more than the adapter's own product, to 24, 11 or 8 bits.
"""

_ROWS, _LENGTH = 4, 32
_SHOWN = 5


@dataclass(frozen=True)
class Expected:
    """What the written model must be.

    Attributes:
        base_name: The base.
        base_hash: Of its weights.
        probe: Token ids to compare on ``(rows, time)``.
        logits: Of the unmerged adapter ``(rows, time, vocabulary)``.
        compute_dtype: The precision in which they were computed.
        digests: Of the base's tensors in the written precision, by name.
        changed: Names of the tensors that the adapter changes.
        adapter_effect: max|Δ| / max|logit| between adapter and base.
        untied: Whether head and embeddings became two matrices.
    """

    base_name: str
    base_hash: str
    probe: Tensor
    logits: Tensor
    compute_dtype: torch.dtype
    digests: dict[str, str]
    changed: set[str]
    adapter_effect: float
    untied: bool


@dataclass(frozen=True)
class Verdict:
    """A passed check: how far the logits are apart, how far they may be, and how many tensors changed."""

    logits_difference: float
    tolerance: float
    changed: int
    unchanged: int


def probe_ids(base: Base) -> Tensor:
    """Token ids from all over the vocabulary ``(4, 32)``, the same for every model of the same size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(base.tokenizer), (_ROWS, _LENGTH), generator=generator).to(base.device)


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The model's logits on the CPU, in at least float32."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))


def relative(values: Tensor, reference: Tensor) -> float:
    """max|values - reference| / max|reference|."""
    return float((values - reference).abs().max() / reference.abs().max())


def verify(written: Base, expected: Expected) -> Verdict:
    """Compare a model that was just loaded from disk with what it should be.

    Args:
        written: Loaded in the precision of its files; converted to the computing precision here.
        expected: What was noted before it was written.

    Raises:
        AdapterError: Every difference: logits, tensors that should differ from the base's and do not, tensors that
            should not and do, tensors that are missing or new.
    """
    faults = []
    now = {name: digest(tensor, written.dtype) for name, tensor in written.model.state_dict().items()}
    same = {name for name in now if now[name] == expected.digests.get(name)}
    faults += _named("tensors are missing", expected.digests.keys() - now.keys())
    faults += _named("tensors are not the base's", now.keys() - expected.digests.keys())
    faults += _named("tensors changed that the adapter does not touch", now.keys() - same - expected.changed)
    lost = expected.changed & same
    # Rounding to 8 or 11 bits may swallow the update of a few tensors whole, but not of all.
    if lost and (written.dtype in (torch.float32, torch.float64) or lost == expected.changed):
        faults += _named("tensors that the adapter changes have the base's bytes", lost)
    written.model.to(dtype=expected.compute_dtype)  # type: ignore[call-arg]
    difference = relative(logits_of(written.model, expected.probe), expected.logits)
    tolerance = max(TOLERANCES[written.dtype], TOLERANCES[expected.compute_dtype]) * max(1.0, expected.adapter_effect)
    if not difference <= tolerance:
        faults.append(f"logits differ by {difference:.1e} from the unmerged adapter's; {tolerance:.0e} is allowed")
    elif difference >= expected.adapter_effect:
        faults.append(
            f"rounding to {written.dtype} moves the logits by {difference:.1e}, the adapter by "
            f"{expected.adapter_effect:.1e} only, so it would be lost; write float32 (merge_dtype)"
        )
    if faults:
        raise AdapterError(
            "the merged model failed its check and was deleted:\n" + "\n".join(f"  - {f}" for f in faults)
        )
    return Verdict(difference, tolerance, len(now) - len(same), len(same))


def _named(what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(sorted(names)[:_SHOWN])
    return [f"{len(names)} {what}: {shown}{', …' if len(names) > _SHOWN else ''}"]
