"""Pruned scoring gives exactly what scoring every label gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorafleet.errors import DataError, ModelError
from lorafleet.evaluation import labels as labels_module
from lorafleet.evaluation.label_search import LabelSearch, build_trie
from lorafleet.evaluation.labels import LabelChoice, TreeScorer, choose_labels, label_log_probs, losses_and_labels
from lorafleet.evaluation.token_loss import LossModel, row_losses
from lorafleet.lora import LoraBank
from lorafleet.models.load import Base
from tests.evaluation.test_token_loss import Row
from tests.generation.tiny_bank import tiny_base, trained_bank
from tests.tiny import ARCHITECTURES

RNG = np.random.Generator(np.random.PCG64(5))
LABELS = [[*RNG.integers(3, 20, RNG.integers(1, 5)).tolist(), 2] for _ in range(40)]
LABELS = [list(label) for label in dict.fromkeys(map(tuple, LABELS))]
PROMPTS = [[7, 8, 9, *RNG.integers(3, 500, length).tolist()] for length in (1, 9, 4, 4, 12, 2, 30)]


def losses_of(base: Base, bank: LoraBank | None = None) -> LossModel:
    return LossModel(base.model, bank, pad_id=0)


def brute(base: Base, bank: LoraBank | None, slot: int) -> NDArray[np.float64]:
    return label_log_probs(losses_of(base, bank), slot, PROMPTS, LABELS, batch_size=64)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_brute_force(arch: str, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_base(arch)
    bank = trained_bank(base)
    with caplog.at_level("INFO"):
        for slot in (-1, 1):
            scores = brute(base, bank, slot)
            found = choose_labels(base, losses_of(base, bank), slot, PROMPTS, LABELS, batch_size=3)
            assert [c.label for c in found] == scores.argmax(1).tolist()
            np.testing.assert_allclose([c.log_prob for c in found], scores.max(1), rtol=1e-10)
    assert "label by label" not in caplog.text  # every architecture takes the fast way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapted_table_leaves_the_fast_way(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """The first parameter of such a model is A, in float32, whatever the base's precision."""
    base = tiny_base(dtype=dtype)
    bank = trained_bank(base, target_modules=["embed_tokens", "q_proj"], scale=0.02)
    with caplog.at_level("INFO"):
        choose_labels(base, losses_of(base, bank), 1, PROMPTS, LABELS, batch_size=3)
    assert "label by label" not in caplog.text


def test_brute_force_equals_a_plain_softmax() -> None:
    base = tiny_base()
    score = label_log_probs(losses_of(base), -1, PROMPTS[:1], LABELS[:1], batch_size=1)[0, 0]
    row = torch.tensor([[*PROMPTS[0], *LABELS[0]]])
    loss = torch.nn.functional.cross_entropy(
        base.model(row).logits[0, len(PROMPTS[0]) - 1 : -1], row[0, len(PROMPTS[0]) :], reduction="sum"
    )
    assert score == pytest.approx(-loss.item(), rel=1e-12)


def test_batch_size_and_order_do_not_matter() -> None:
    base = tiny_base()
    one = choose_labels(base, losses_of(base), -1, PROMPTS, LABELS, batch_size=1)
    many = choose_labels(base, losses_of(base), -1, PROMPTS[::-1], LABELS, batch_size=64)[::-1]
    assert [c.label for c in one] == [c.label for c in many]
    np.testing.assert_allclose([c.log_prob for c in one], [c.log_prob for c in many], rtol=1e-10)


FEW_LABELS = [[4, 5, 2], [4, 2], [9, 2]]


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gemma2"])
def test_few_labels_beside_a_rows_own_loss(arch: str) -> None:
    base = tiny_base(arch)
    losses = losses_of(base, trained_bank(base))
    rows = [
        Row(
            np.array([*p, *FEW_LABELS[i % 3], 3]),
            np.array([i % 2 > 0] * len(p) + [True] * (len(FEW_LABELS[i % 3]) + 1)),
        )
        for i, p in enumerate(PROMPTS)
    ]
    for slot in (-1, 1):
        own, found = losses_and_labels(base, losses, slot, rows, PROMPTS, FEW_LABELS, batch_size=3)
        for (loss, count), (wanted, targets) in zip(own, row_losses(losses, rows, slot, 4), strict=True):
            assert (loss, count) == (pytest.approx(wanted, rel=1e-7), targets)
        scores = label_log_probs(losses, slot, PROMPTS, FEW_LABELS, batch_size=2)
        assert [choice.label for choice in found] == scores.argmax(1).tolist()
        np.testing.assert_allclose([choice.log_prob for choice in found], scores.max(1), rtol=1e-7)


def test_few_labels_compute_a_prompt_once() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    losses, tokens = losses_of(base, bank), list[int]()
    next(iter(bank.layers.values())).register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[-2]))
    rows = [Row(np.array([*p, 4, 2]), np.array([False] * len(p) + [True] * 2)) for p in PROMPTS]
    losses_and_labels(base, losses, 1, rows, PROMPTS, FEW_LABELS, batch_size=len(PROMPTS))
    # All prompts begin with three tokens; of an answer all but the last token, which predicts nothing.
    assert tokens == [3 + sum(len(p) - 3 for p in PROMPTS) + len(PROMPTS) * (1 + 2 + 1 + 1)]


def few(base: Base, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> list[LabelChoice]:
    rows = [Row(np.array([5, 6]), np.array([False, True])) for _ in prompts]
    return losses_and_labels(base, losses_of(base), -1, rows, prompts, labels, batch_size=2)[1]


def test_many_labels_or_long_prompts_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    base, searched = tiny_base(), list[int]()
    original = labels_module.choose_labels

    def search(*arguments: Any, **named: Any) -> list[LabelChoice]:
        searched.append(len(arguments[4]))
        return original(*arguments, **named)

    monkeypatch.setattr(labels_module, "choose_labels", search)
    monkeypatch.setattr(labels_module, "FEW", 3 * max(map(len, PROMPTS)))
    found = few(base, PROMPTS, LABELS[:3])
    assert searched == []
    longer = few(base, [*PROMPTS, [*max(PROMPTS, key=len), 9]], LABELS[:3])
    assert [one.label for one in longer[:-1]] == [one.label for one in found]
    few(base, PROMPTS, LABELS[:4])
    assert searched == [3, 4]


def test_bad_labels_and_prompts_are_named_for_few_labels() -> None:
    base = tiny_base()
    with pytest.raises(DataError, match="labels 0 and 1 have the same tokens"):
        few(base, PROMPTS, [[1, 2], [1, 2]])
    with pytest.raises(DataError, match="prompts are empty"):
        few(base, [[1], []], FEW_LABELS)
    assert few(base, [], FEW_LABELS) == []
    base.model.lm_head.weight.data[5, 1] = float("nan")
    with pytest.raises(ModelError, match="not numbers"):
        few(base, PROMPTS, FEW_LABELS)


def test_prompts_share_their_prefix_once() -> None:
    base = tiny_base()
    scorer = TreeScorer(base, None, -1, PROMPTS, build_trie(LABELS))
    assert scorer.prefix == [7, 8, 9]
    same = TreeScorer(base, None, -1, [[5, 6, 7]] * 2, build_trie(LABELS))
    assert same.prefix == [5, 6]
    assert TreeScorer(base, None, -1, [[5], [6]], build_trie(LABELS)).prefix == []


def test_pruning_leaves_most_labels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    base.model.lm_head.weight.data *= 10  # a sure model
    fed: list[int] = []
    original = TreeScorer._forward

    def count(self, ids, *arguments, **named):  # type: ignore[no-untyped-def]
        fed.append(sum(len(row) for row in ids))
        return original(self, ids, *arguments, **named)

    monkeypatch.setattr(TreeScorer, "_forward", count)
    choose_labels(base, losses_of(base), -1, PROMPTS, LABELS, batch_size=len(PROMPTS))
    nodes = len(build_trie(LABELS).tokens) - 1
    assert sum(fed) < sum(map(len, PROMPTS)) * 2 + 0.5 * nodes * len(PROMPTS)


def test_a_model_with_a_short_window_is_scored_label_by_label(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_base("mistral", sliding_window=8)
    with caplog.at_level("INFO"):
        found = choose_labels(base, losses_of(base), -1, PROMPTS, LABELS, batch_size=4)
    assert "label by label" in caplog.text
    assert [c.label for c in found] == brute(base, None, -1).argmax(1).tolist()


def test_a_model_that_refuses_the_mask_is_scored_label_by_label(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()

    def refuse(*_: object, **__: object) -> None:
        raise TypeError("no such mask")

    monkeypatch.setattr(labels_module.TreeScorer, "_forward", refuse)
    found = choose_labels(base, losses_of(base), -1, PROMPTS, LABELS, batch_size=4)
    assert [c.label for c in found] == brute(base, None, -1).argmax(1).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_search_equals_exhaustive_search_on_random_trees(seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = list({(*rng.integers(0, 4, rng.integers(1, 6)).tolist(), 9) for _ in range(30)})
    if seed % 2:
        labels = list({label[:-1] for label in labels})  # labels that are beginnings of other labels
    trie = build_trie(labels)
    tables = {node: np.log(rng.dirichlet(np.full(len(trie.vocabulary), 0.3))) for node in range(len(trie.tokens))}

    def exact(label: tuple[int, ...]) -> float:
        node, total = 0, 0.0
        for token in label:
            total += tables[node][trie.vocabulary.index(token)]
            node = next(c for c in trie.children[node] if trie.tokens[c] == token)
        return total

    search, opened = LabelSearch(trie, tables[0]), 0
    while not search.done:
        for node in search.next_nodes(3):
            search.take(node, tables[node])
            opened += 1
    scores = [exact(label) for label in labels]
    assert search.log_prob == pytest.approx(max(scores), rel=1e-12)
    assert scores[search.label] == max(scores)


def test_bad_labels_and_prompts_are_named() -> None:
    base = tiny_base()
    losses = losses_of(base)
    with pytest.raises(DataError) as error:
        build_trie([[1, 2], [], [1, 2]])
    assert "label 1 has no tokens" in str(error.value)
    assert "labels 0 and 2 have the same tokens" in str(error.value)
    with pytest.raises(DataError, match="no labels"):
        build_trie([])
    with pytest.raises(DataError, match="prompts are empty"):
        choose_labels(base, losses, -1, [[1], []], LABELS, batch_size=2)
    assert choose_labels(base, losses, -1, [], LABELS, batch_size=2) == []


def test_nan_is_an_error() -> None:
    base = tiny_base()
    base.model.lm_head.weight.data[5, 1] = float("nan")
    with pytest.raises(ModelError, match="not numbers"):
        choose_labels(base, losses_of(base), -1, PROMPTS, LABELS, batch_size=2)
