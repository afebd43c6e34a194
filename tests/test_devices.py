"""The same contracts on every device that this machine has: on a GPU the kernels are others, the results are not."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.data.batches import Part, collate
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import LoraBank, inject_lora
from lorafleet.lora.segments import row_groups
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from lorafleet.training.run import train
from tests.evaluation.test_token_loss import make_rows
from tests.lora.test_bank import fill
from tests.tiny import tiny_base_folder, tiny_model

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
PRECISIONS = [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.3)]
LORAS = [LoraConfig(r=2), LoraConfig(r=4, target_modules="attention"), LoraConfig(r=3, modules_to_save=["lm_head"])]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted.double().cpu()).norm() / wanted.double().cpu().norm())


def loss_and_gradients(
    device: torch.device, dtype: torch.dtype, *, flat: bool, even: bool
) -> tuple[float, list[Tensor]]:
    model = tiny_model("llama", torch.float64).to(device, dtype)
    bank = inject_lora(model, LORAS)
    for slot in range(len(LORAS)):
        fill_from_float64(bank, slot)
    loss_model = LossModel(model, bank, 0, padded=not flat)
    assert loss_model.flat == flat
    lengths = (6, 6) if even else (5, 9, 140)
    loss = loss_model(collate([Part(slot, make_rows(slot, lengths), weight=0.01) for slot in range(len(LORAS))]))
    loss.total.backward()
    grads = [p.grad for slot in range(3) for p in bank.slot_parameters(slot).values() if p.grad is not None]
    return loss.total.item(), [grad.clone() for grad in grads]


def fill_from_float64(bank: LoraBank, slot: int) -> None:
    reference = inject_lora(tiny_model("llama", torch.float64), LORAS)
    fill(reference, slot, seed=slot)
    values = {name: parameter.value for name, parameter in reference.slot_parameters(slot).items()}
    for name, parameter in bank.slot_parameters(slot).items():
        parameter.value.copy_(values[name])


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_flat_and_padded_batches_agree_with_float64_on_the_cpu(
    device: torch.device, dtype: torch.dtype, tolerance: float, even: bool
) -> None:
    loss, grads = loss_and_gradients(torch.device("cpu"), torch.float64, flat=False, even=even)
    for flat in (True, False):
        got, got_grads = loss_and_gradients(device, dtype, flat=flat, even=even)
        assert got == pytest.approx(loss, rel=tolerance)
        for number, (one, wanted) in enumerate(zip(got_grads, grads, strict=True)):
            if wanted.any():
                assert relative(one, wanted) <= tolerance, number


@pytest.mark.parametrize("lengths", [(16, 16, 16), (5, 33, 10), (1, 46, 1)], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_products_by_segment_on_the_device(device: torch.device, lengths: tuple[int, ...]) -> None:
    """In bfloat16 and with sizes that a GPU's grouped product takes; each segment against a product of its own."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    generator = torch.Generator().manual_seed(0)
    made = ((48, 64), (48, 24), (3, 64, 24))
    x, low, A = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in made)
    groups = row_groups(segments, x, [8, 24, 64])
    assert (groups.ends is not None) == (device.type == "cuda" and len(set(lengths)) > 1)
    added = x.clone()
    groups.add_product(added, low, A.mT)
    # The middle columns of a joint tensor, as the layers of a joint product have them.
    outer, product = groups.outer_product(low[:, 8:16], x), groups.product(x, A)
    for slot, bounds in enumerate(segments):
        rows = slice(*bounds)
        assert relative(product[rows], x[rows].double() @ A[slot].double()) <= 0.01
        assert relative(added[rows], x[rows].double() + low[rows].double() @ A[slot].double().T) <= 0.01
        assert relative(outer[slot], low[rows, 8:16].double().T @ x[rows].double()) <= 0.01


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_population_equals_single_runs(device: torch.device) -> None:
    def run(slots: list[int]) -> list[list[Tensor]]:
        model = tiny_model("llama", torch.float64).to(device)
        bank = inject_lora(model, [LORAS[number] for number in slots])
        members = []
        for slot, number in enumerate(slots):
            bank.remove(slot)
            bank.add(LORAS[number].model_copy(update={"lora_dropout": 0.1}), seed=number, slot=slot)
            config = TrainingConfig(seed=number, max_steps=10, learning_rate=1e-2, per_device_train_batch_size=2)
            members.append(Member(f"m{number}", bank, slot, config, make_rows(number, (5, 9, 4, 4, 7))))
        quiet = RunConfig(output_dir="unused", save_strategy="no")
        Population(members, LossModel(model, bank, 0), bank, quiet).train()
        return [list(bank.state_dict(slot).values()) for slot in range(len(slots))]

    for number, together in enumerate(run([0, 1, 2])):
        for got, wanted in zip(together, run([number])[0], strict=True):
            assert relative(got, wanted) <= 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_train_learns_on_the_device(device: torch.device, checkpointing: bool, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("fox", "dog", "cat", "box") * 5]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        model=str(tiny_base_folder(tmp_path / "base", "llama")),
        data=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        device=str(device),
        max_steps=20,
        learning_rate=0.02,
        gradient_checkpointing=checkpointing,
    )
    assert result.eval_loss is not None and result.eval_loss_before is not None
    assert result.eval_loss < 0.9 * result.eval_loss_before
