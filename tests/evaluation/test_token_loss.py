"""Flat batches and the chunked loss against a plain padded loop over transformers."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorafleet.config.lora import LoraConfig
from lorafleet.data.batches import Part, collate
from lorafleet.evaluation import token_loss
from lorafleet.evaluation.token_loss import LossModel, mean_loss, row_losses
from lorafleet.lora import inject_lora
from tests.lora.test_bank import fill
from tests.tiny import ARCHITECTURES, tiny_model

RMS_NORM = {"llama", "qwen2", "qwen3", "gemma", "mistral", "granite"}


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    loss_mask: np.ndarray


def make_rows(seed: int, lengths: tuple[int, ...] = (7, 4, 9, 4), prompt: int = 0) -> list[Row]:
    """Random rows, of which some tokens are targets; all begin with the same ``prompt`` tokens."""
    rng = np.random.default_rng(seed)
    rows = [Row(rng.integers(3, 500, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths]
    for row in rows:
        row.input_ids[:prompt] = rows[0].input_ids[:prompt]
    return rows


def plain_losses(model: nn.Module, rows: list[Row]) -> list[Tensor]:
    """Each row alone through the model's own forward: summed loss of its targets."""
    out = []
    for row in rows:
        logits = model(input_ids=torch.as_tensor(row.input_ids, dtype=torch.long)[None]).logits[0]
        where = torch.as_tensor(np.flatnonzero(row.loss_mask[1:]))
        targets = torch.as_tensor(row.input_ids, dtype=torch.long)[where + 1]
        out.append(nn.functional.cross_entropy(logits[where], targets, reduction="sum"))
    return out


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gemma2", "granite"])
def test_loss_and_gradients_equal_a_plain_loop(arch: str, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", 3)
    overrides = {"final_logit_softcapping": 5.0, "num_key_value_heads": 2, "head_dim": 8} if arch == "gemma2" else {}
    model = tiny_model(arch, torch.float64, **overrides)
    rows = make_rows(0, prompt=prompt)
    bank = inject_lora(model, LoraConfig(r=2))
    fill(bank, 0)
    plain = torch.stack(plain_losses(model, rows)).sum()
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in bank.slot_parameters(0).items() if p.grad is not None}
    model.zero_grad()
    loss_model = LossModel(model, bank, pad_id=0)
    assert loss_model.flat == (arch != "gemma2")  # its attention caps the scores, so it takes the padded path
    batch = collate([Part(0, rows)])
    assert (batch.shared_prompts() is not None) == bool(prompt)
    loss = loss_model(batch)
    loss.total.backward()
    # RMSNorm computes in float32 whatever the weights are: padded rows come out of it in another order, and the
    # gradients of a prompt's repetitions are added before it instead of after it.
    exact, close = (1e-6, 1e-4) if arch == "gemma2" else (1e-10, 1e-6 if prompt and arch in RMS_NORM else 1e-8)
    torch.testing.assert_close(loss.total, plain, rtol=exact, atol=0)
    assert loss.parts[0] == pytest.approx(plain.item(), rel=exact)
    for name, parameter in bank.slot_parameters(0).items():
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("padded", [False, True])
def test_each_part_of_a_mixed_batch_equals_its_own(padded: bool) -> None:
    model = tiny_model("llama", torch.float64)
    bank = inject_lora(model, [LoraConfig(r=2, modules_to_save=["lm_head"]), LoraConfig(r=3)])
    for slot in range(2):
        fill(bank, slot, seed=slot)
    loss_model = LossModel(model, bank, pad_id=0, padded=padded)
    assert loss_model.flat != padded
    parts = [Part(1, make_rows(1, prompt=2)), Part(-1, make_rows(2)), Part(0, make_rows(3, prompt=4), weight=0.5)]
    together = loss_model(collate(parts))
    for part, loss in zip(parts, together.parts, strict=True):
        assert loss == pytest.approx(loss_model(collate([part])).parts[0], rel=1e-12)
    expected = together.parts[0] + together.parts[1] + 0.5 * together.parts[2]
    assert together.total.item() == pytest.approx(expected, rel=1e-12)


def test_sliding_windows_are_kept() -> None:
    model = tiny_model("mistral", torch.float64, sliding_window=3)
    rows = make_rows(5, lengths=(9, 12), prompt=5)
    loss_model = LossModel(model, None, pad_id=0)
    assert loss_model.flat
    wanted = sum(loss.item() for loss in plain_losses(model, rows))
    assert loss_model(collate([Part(-1, rows)])).parts[0] == pytest.approx(wanted, rel=1e-10)


def computed(rows: list[Row]) -> int:
    """Tokens of rows up to their last target, which itself predicts nothing; one at least."""
    return sum(max([1, *np.flatnonzero(row.loss_mask)]) for row in rows)


# Through SDPA, and through the attention of short rows.
@pytest.mark.parametrize(("lengths", "prompt"), [((140, 150), 30), ((7, 9, 9), 5)])
def test_a_shared_prompt_saves_its_repetitions(lengths: tuple[int, ...], prompt: int) -> None:
    model = tiny_model("llama", torch.float64, max_position_embeddings=256)
    bank = inject_lora(model, LoraConfig(r=2))
    fill(bank, 0)
    tokens: list[int] = []
    next(iter(bank.layers.values())).register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[-2]))
    rows = make_rows(3, lengths, prompt)
    loss_model = LossModel(model, bank, pad_id=0)
    tokens.clear()
    total = loss_model(collate([Part(0, rows)])).total
    assert tokens == [computed(rows) - prompt * (len(lengths) - 1)]
    assert total.item() == pytest.approx(sum(loss.item() for loss in plain_losses(model, rows)), rel=1e-10)


def test_rows_with_dropout_share_no_prompt() -> None:
    model = tiny_model("llama", torch.float64)
    bank = inject_lora(model, [LoraConfig(r=2, lora_dropout=0.5), LoraConfig(r=2)])
    tokens: list[int] = []
    next(iter(bank.layers.values())).register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[-2]))
    loss_model = LossModel(model, bank, pad_id=0)
    batch = collate([Part(slot, make_rows(slot, prompt=3)) for slot in range(2)])
    tokens.clear()
    for mode in (bank.train, bank.eval):
        mode()
        loss_model(batch)
    one_apart, shared = batch.shared_prompts(apart=[0]), batch.shared_prompts()
    assert one_apart is not None and shared is not None
    assert tokens == [len(one_apart.kept), len(shared.kept)] and tokens[1] < tokens[0] < batch.tokens


def test_an_adapted_head_routes_its_targets() -> None:
    model = tiny_model("llama", torch.float64)
    bank = inject_lora(model, [LoraConfig(target_modules="lm_head"), LoraConfig(target_modules="all-linear")])
    for slot in range(2):
        fill(bank, slot, seed=slot)
    loss_model = LossModel(model, bank, pad_id=0)
    parts = [Part(1, make_rows(1)), Part(0, make_rows(2))]
    together = loss_model(collate(parts)).parts
    alone = tuple(loss_model(collate([part])).parts[0] for part in parts)
    assert together == pytest.approx(alone, rel=1e-12)


def test_rows_losses_are_theirs_whatever_their_order_and_batch() -> None:
    model = tiny_model("gpt2", torch.float64)
    bank = inject_lora(model, LoraConfig())
    rows = make_rows(7, lengths=(5, 9, 6, 11, 3))
    rows[2].loss_mask[:] = False  # nothing to predict, in a batch of its own where batches are of one row
    loss_model = LossModel(model, bank, pad_id=0)
    counts = [int(row.loss_mask[1:].sum()) for row in rows]
    base = [loss.item() for loss in plain_losses(model, rows)]
    fill(bank, 0)
    adapted = [loss.item() for loss in plain_losses(model, rows)]
    for slot, wanted in ((-1, base), (0, adapted)):
        for size in (1, 2, 5):
            measured = row_losses(loss_model, rows, slot, size)
            assert measured == [(pytest.approx(loss), count) for loss, count in zip(wanted, counts, strict=True)]
            assert mean_loss(measured) == pytest.approx(sum(wanted) / sum(counts))
    assert math.isnan(mean_loss(measured[2:3]))
