"""Find the likeliest label without scoring every label: best first, with exact bounds. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from lorafleet.errors import DataError, raise_all

ROOT = 0


@dataclass(frozen=True)
class LabelTrie:
    """The labels' tokens as a tree; labels that begin alike share nodes. Node 0 is the root, before the first token.

    Attributes:
        tokens: Token of each node; -1 for the root.
        parents: Parent of each node; -1 for the root.
        depths: Tokens from the root to each node, the node's own included.
        children: Children of each node.
        labels: Number of the label that ends at each node, or -1.
        vocabulary: The tokens that occur, each once.
        columns: For each node, where its children's tokens stand in ``vocabulary``.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    vocabulary: tuple[int, ...]
    columns: tuple[NDArray[np.intp], ...]

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to ``node``."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]


def build_trie(labels: Sequence[Sequence[int]]) -> LabelTrie:
    """Build the tree of labels, given as token ids with the token that ends the answer.

    Raises:
        DataError: A label is empty, or two labels have the same tokens; lists all of them.
    """
    tokens, parents, depths, ends = [-1], [-1], [0], [-1]
    children: list[dict[int, int]] = [{}]
    faults = [] if labels else ["there are no labels"]
    for number, label in enumerate(labels):
        node = ROOT
        for token in label:
            if token not in children[node]:
                children[node][token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depths.append(depths[node] + 1)
                ends.append(-1)
                children.append({})
            node = children[node][token]
        if node == ROOT:
            faults.append(f"label {number} has no tokens")
        elif ends[node] >= 0:
            faults.append(f"labels {ends[node]} and {number} have the same tokens")
        else:
            ends[node] = number
    raise_all(DataError, faults, "the labels cannot be told apart")
    vocabulary = tuple(sorted(set(tokens[1:])))
    place = {token: column for column, token in enumerate(vocabulary)}
    return LabelTrie(
        tokens=tuple(tokens),
        parents=tuple(parents),
        depths=tuple(depths),
        children=tuple(tuple(c.values()) for c in children),
        labels=tuple(ends),
        vocabulary=vocabulary,
        columns=tuple(np.array([place[t] for t in c], dtype=np.intp) for c in children),
    )


class LabelSearch:
    """The search of one row.

    ``log p(label) = Σ log p(token | prompt, tokens before)`` only falls with each token, so a node's sum bounds all
    labels below it. First one label is followed down to its end, the likeliest token at each step; then nodes are
    opened best first until no bound reaches the best label that is known exactly.

    Args:
        trie: The labels.
        log_probs: Log-probabilities of ``trie.vocabulary`` after the prompt.
    """

    def __init__(self, trie: LabelTrie, log_probs: NDArray[np.float64]) -> None:
        self.trie = trie
        self.label, self.log_prob = -1, -np.inf
        self._sums: dict[int, float] = {ROOT: 0.0}
        self._open: list[tuple[float, int]] = []
        self._chosen: set[int] = set()
        self._last = ROOT
        self.take(ROOT, log_probs)

    @property
    def done(self) -> bool:
        """Whether no open node can hold a better label."""
        return not self._open or -self._open[0][0] < self.log_prob

    def next_nodes(self, width: int) -> list[int]:
        """The nodes to open next, parents before children.

        While no label is known, the likeliest child of the last node and what follows it without a choice; then the
        most promising nodes, at most ``width``.
        """
        if self.label < 0:
            return self._descend()
        nodes: list[int] = []
        while len(nodes) < width and not self.done:
            nodes.append(heappop(self._open)[1])
        return nodes

    def take(self, node: int, log_probs: NDArray[np.float64]) -> None:
        """Open a node, given the log-probabilities of ``trie.vocabulary`` behind it."""
        self._last = node
        sums = self._sums[node] + log_probs[self.trie.columns[node]]
        for child, total in zip(self.trie.children[node], sums.tolist(), strict=True):
            self._sums[child] = total
            label = self.trie.labels[child]
            if label >= 0 and (-total, label) < (-self.log_prob, self.label if self.label >= 0 else label + 1):
                self.label, self.log_prob = label, total
            if self.trie.children[child] and child not in self._chosen:
                heappush(self._open, (-total, child))

    def _descend(self) -> list[int]:
        # A child without children of its own ends a label, and then a label would be known.
        nodes = [max(self.trie.children[self._last], key=self._sums.__getitem__)]
        while len(following := self.trie.children[nodes[-1]]) == 1 and self.trie.children[following[0]]:
            nodes.append(following[0])
        self._chosen.update(nodes)
        self._open = [entry for entry in self._open if entry[1] not in self._chosen]
        heapify(self._open)
        return nodes
