"""Shorten a row to ``max_length`` tokens without losing what it trains.

A row whose first answer fits is cut at the end. Otherwise tokens are taken out of the prompt, from the middle of its
longest stretches between control tokens, so that the template's structure, the start and the end of the question and
the answer stay; the prompt keeps at least half of ``max_length``, and an answer that is longer than the rest is cut.
"""

import numpy as np
from numpy.typing import NDArray

from lorafleet.data.conversation import BadRow

# A stretch of prompt is never cut below this: its ends hold a role's name and the words around the cut.
_SHORTEST_STRETCH = 16


class TooLong(BadRow):
    """A sample that would lose all its trained tokens."""


def shorten(
    trained: NDArray[np.bool_], answer: tuple[int, int], is_control: NDArray[np.bool_], max_length: int
) -> NDArray[np.int64]:
    """Choose the tokens that stay of a row with more than ``max_length`` tokens.

    Args:
        trained: Loss mask ``(tokens,)``.
        answer: Tokens [start, end) of the row's first answer; (0, 0) for plain text.
        is_control: True for control tokens ``(tokens,)``, which a prompt never loses.
        max_length: Tokens to keep, at most.

    Returns:
        Positions that stay, ascending, at most ``max_length``.

    Raises:
        TooLong: No trained token would be left.
    """
    start, end = answer
    positions = np.arange(len(trained))
    if end > max_length:
        room_for_prompt = max(max_length - (end - start), max_length // 2)
        prompt = _thin_out(is_control[:start], room_for_prompt)
        positions = np.concatenate([prompt, positions[start:]])
    kept = positions[:max_length]
    if not trained[kept[1:]].any():
        raise TooLong(
            f"all trained tokens would be lost: the row has {len(trained)} tokens, its answer begins at token "
            f"{start + 1}, and max_length is {max_length}; raise max_length or shorten the row"
        )
    return kept


def _thin_out(is_control: NDArray[np.bool_], room: int) -> NDArray[np.int64]:
    """Positions of a prompt that stay when its longest stretches are levelled until ``room`` tokens are left."""
    stretches = _stretches(is_control)
    lengths = np.array([end - start for start, end in stretches], dtype=np.int64)
    surplus = len(is_control) - room
    level = int(lengths.max(initial=0))
    low = _SHORTEST_STRETCH
    while low < level:  # the highest level that removes enough
        middle = (low + level + 1) // 2
        if (lengths - np.minimum(lengths, middle)).sum() >= surplus:
            low = middle
        else:
            level = middle - 1
    keep = np.ones(len(is_control), dtype=bool)
    for start, end in stretches:
        length = end - start
        allowed = max(min(length, low), length - surplus)
        if allowed < length:
            head = (allowed + 1) // 2
            keep[start + head : end - (allowed - head)] = False
            surplus -= length - allowed
    return np.flatnonzero(keep)


def _stretches(is_control: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Maximal ranges [start, end) without control tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_control, [True]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
