"""Which rows of train are held out for validation: seeded, stable under reordering, no question on both sides."""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_SEED = b"lorafleet held out 1"


def choose_held_out(openings: Sequence[bytes], fingerprints: Sequence[bytes], fraction: float) -> NDArray[np.int64]:
    """Choose rows to hold out.

    Rows are ranked by a hash of their first question and taken in that order until the share is reached, so the same
    rows are held out wherever they stand in the file, and rows that ask the same go to the same side. Where that is not
    possible because all rows ask the same, whole rows are ranked, and at last positions.

    Args:
        openings: For each row, equal for equal first questions.
        fingerprints: For each row, equal for equal rows.
        fraction: Share to hold out, above 0; at least one row, never all.

    Returns:
        Row numbers, ascending.
    """
    wanted = min(max(1, round(fraction * len(openings))), len(openings) - 1)
    positions = [str(number).encode() for number in range(len(openings))]
    for keys in (openings, fingerprints, positions):
        chosen = _take_groups(keys, wanted)
        if chosen:
            return np.array(sorted(chosen), dtype=np.int64)
    return np.zeros(0, dtype=np.int64)


def _take_groups(keys: Sequence[bytes], wanted: int) -> list[int]:
    """Take whole groups in the order of their hash, passing over those that no longer fit."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    chosen: list[int] = []
    for key in sorted(groups, key=lambda key: blake2b(_SEED + key, digest_size=16).digest()):
        if len(chosen) + len(groups[key]) <= wanted:
            chosen += groups[key]
    return chosen
