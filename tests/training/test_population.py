"""The contract of a population: training K adapters together equals training each alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafleet.config.lora import LoraConfig
from lorafleet.config.training import RunConfig, TrainingConfig, ValidationConfig
from lorafleet.data.batches import FlatBatch
from lorafleet.errors import TrainingError
from lorafleet.evaluation.token_loss import LossModel, TokenLoss
from lorafleet.lora import LoraBank, LoraLinear, inject_lora
from lorafleet.lora.init import STARTS
from lorafleet.lora.routing import Segment
from lorafleet.lora.segments import LoraSegment
from lorafleet.training import loop
from lorafleet.training.events import Event, Failed, Finished, StepDone
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from lorafleet.training.queue import AdapterQueue, Candidate
from tests.evaluation.test_token_loss import Row, make_rows
from tests.tiny import tiny_model

QUIET = RunConfig(output_dir="unused", save_strategy="no")


@dataclass(frozen=True)
class Plan:
    """One adapter of a population: all that decides its result."""

    lora: LoraConfig
    training: TrainingConfig
    rows: list[Row]


def plan(seed: int, lora: dict[str, Any], training: dict[str, Any], rows: int = 11, prompt: int = 0) -> Plan:
    lengths = tuple(np.random.default_rng(seed).integers(3, 12, rows).tolist())
    settings = {"seed": seed, "max_steps": 50, "learning_rate": 1e-2, "per_device_train_batch_size": 2} | training
    return Plan(LoraConfig(**lora), TrainingConfig(**settings), make_rows(seed, lengths, prompt))


PLANS = [
    plan(1, {"r": 2}, {}, prompt=3),
    plan(2, {"r": 4, "lora_dropout": 0.3}, {"learning_rate": 3e-3, "gradient_accumulation_steps": 3}),
    plan(3, {"r": 3, "target_modules": "attention"}, {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2}),
    plan(4, {"r": 1, "target_modules": ["down_proj"], "use_rslora": True}, {"weight_decay": 0.1}),
    plan(5, {"r": 2, "rank_pattern": {"q_proj": 5}}, {"max_grad_norm": 0.01, "per_device_train_batch_size": 4}),
    plan(6, {"r": 2, "modules_to_save": ["lm_head"]}, {"lr_scheduler_type": "constant"}),
    plan(7, {"r": 6, "target_modules": "mlp", "lora_dropout": 0.1}, {"max_steps": 23}),
    plan(
        8,
        {"r": 2, "init_lora_weights": "gaussian"},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
        5,
        prompt=2,
    ),
    plan(
        9, {"r": 2, "init_lora_weights": "pissa", "lora_dropout": 0.1}, {"loraplus_lr_ratio": 4, "max_grad_norm": 0.5}
    ),
    plan(10, {"r": 3, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}, {"weight_decay": 0.1}),
    plan(11, {"r": 2, "init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}, {"max_grad_norm": 0.1}),
    plan(12, {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}, {"gradient_accumulation_steps": 2}, prompt=2),
]


def train(
    plans: list[Plan], slots: list[int] | None = None, dtype: torch.dtype = torch.float64, padded: bool = False
) -> list[dict[str, Tensor]]:
    """Train the plans together and return each one's weights and optimizer moments."""
    model = tiny_model("llama", dtype)
    order = slots or list(range(len(plans)))
    bank = inject_lora(model, LoraConfig(r=1, target_modules=["q_proj"]), num_slots=len(plans))
    bank.remove(0)
    for number, one in enumerate(plans):
        bank.add(one.lora, seed=one.training.seed, slot=order[number])
    members = [Member(f"m{number}", bank, order[number], one.training, one.rows) for number, one in enumerate(plans)]
    Population(members, LossModel(model, bank, 0, padded=padded), bank, QUIET).train()
    return [trained(member) for member in members]


def trained(member: Member) -> dict[str, Tensor]:
    """A copy of a member's tensors; what its neighbours' larger ranks leave of its slot is still zero."""
    for path, layer in member.bank.layers.items():
        for name, stacked in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            assert not stacked[member.slot, layer.ranks[member.slot] :].any(), f"{path}.{name}: padding"
    return {name.partition("/")[2]: tensor.clone() for name, tensor in member.tensors().items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        difference = (got[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30)
        assert difference <= tolerance, f"{name}: {difference:.1e} relative"


@pytest.fixture(scope="module")
def solo() -> list[dict[str, Tensor]]:
    return [train([one])[0] for one in PLANS]


def test_mixed_adapters_together_equal_single_runs(solo: list[dict[str, Tensor]]) -> None:
    for got, wanted in zip(train(PLANS), solo, strict=True):
        assert_same(got, wanted)


def test_slots_permuted_and_neighbours_removed_change_nothing(solo: list[dict[str, Tensor]]) -> None:
    for number, got in zip((6, 1, 4), train([PLANS[6], PLANS[1], PLANS[4]], slots=[2, 0, 1]), strict=True):
        assert_same(got, solo[number])


@pytest.mark.parametrize("padded", [False, True])
def test_dropout_follows_seed_and_step_alone(padded: bool) -> None:
    """In the output head too, and where padding depends on the neighbours."""
    few = {"max_steps": 6, "gradient_accumulation_steps": 2}
    plans = [
        plan(9, {"r": 2, "lora_dropout": 0.3, "target_modules": ["lm_head", "q_proj"]}, few),
        plan(10, {"r": 3, "lora_dropout": 0.2}, few),
    ]
    wanted = [train([one], padded=padded)[0] for one in plans]
    torch.rand(7)  # the global generator goes on
    for got, alone in zip(train(plans, padded=padded), wanted, strict=True):
        assert_same(got, alone)


def test_training_changes_every_adapter(solo: list[dict[str, Tensor]]) -> None:
    for one, tensors in zip(PLANS, solo, strict=True):
        model = tiny_model("llama", torch.float64)
        fresh = inject_lora(model, one.lora, seed=one.training.seed)
        for name, parameter in fresh.slot_parameters(0).items():
            assert (tensors[f"value/{name}"] - parameter.value).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    ("name", "sabotage"),
    [
        ("a global loss mean", lambda part: part.__class__(part.slot, part.rows, part.weight / 2, part.dropout_key)),
        ("a shared dropout key", lambda part: part.__class__(part.slot, part.rows, part.weight, 7)),
    ],
)
def test_a_broken_population_is_caught(
    name: str, sabotage: Any, solo: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = loop.collate
    monkeypatch.setattr(loop, "collate", lambda parts: collate([sabotage(part) for part in parts]))
    with pytest.raises(AssertionError, match="relative"):
        # Plan 1 has dropout and clips nothing away, so both a wrong scale and a wrong mask show.
        assert_same(train([PLANS[1], PLANS[0]])[0], solo[1])


def test_base_bytes_never_change() -> None:
    model = tiny_model("llama")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bank = inject_lora(model, PLANS[5].lora, seed=6)
    Population([Member("m", bank, 0, PLANS[5].training, PLANS[5].rows)], LossModel(model, bank, 0), bank, QUIET).train()
    assert not all(torch.equal(layer.lora_B, torch.zeros_like(layer.lora_B)) for layer in bank.layers.values())
    state = model.state_dict()
    for name, tensor in base.items():
        module, _, leaf = name.rpartition(".")
        found = [state[n] for n in (name, f"{module}.base_layer.{leaf}", f"{module}.original.{leaf}") if n in state]
        assert len(found) == 1 and torch.equal(found[0], tensor), name


def test_a_nan_stops_its_adapter_alone_and_keeps_its_last_good_state(solo: list[dict[str, Tensor]]) -> None:
    model = tiny_model("llama", torch.float64)
    bank = inject_lora(model, [PLANS[0].lora, PLANS[2].lora])
    for slot, number in enumerate((0, 2)):
        bank.remove(slot)
        bank.add(PLANS[number].lora, seed=PLANS[number].training.seed, slot=slot)
    members = [Member(f"m{n}", bank, slot, PLANS[n].training, PLANS[n].rows) for slot, n in enumerate((0, 2))]
    events: list[Event] = []
    kept: dict[str, Tensor] = {}

    def poison(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.name == "m0" and event.step == 4:
            bank.layers["model.layers.0.self_attn.q_proj"].lora_A.data[0, 0, 0] = math.nan
            kept.update(trained(members[0]))

    Population(members, LossModel(model, bank, 0), bank, QUIET, observers=[poison]).train()
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.name, event.step) for event in failed] == [("m0", 5)]
    assert "the loss is nan" in failed[0].reason and len(failed[0].rows) == 2
    assert members[0].progress.status == "failed"
    torch.testing.assert_close(trained(members[0]), kept, rtol=0, atol=0, equal_nan=True)
    assert_same(trained(members[1]), solo[2])


def test_accumulation_equals_one_large_batch() -> None:
    # Rows with nothing in common: a shared prompt's gradients would meet RMSNorm's float32 in other sums.
    rows = PLANS[1].rows[:8]
    small = TrainingConfig(
        max_steps=10, learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    large = TrainingConfig(max_steps=10, learning_rate=1e-2, per_device_train_batch_size=8)
    one, other = (train([Plan(LoraConfig(r=2), config, rows)])[0] for config in (small, large))
    assert_same(one, other, tolerance=1e-9)


def test_fp32_gradients_of_a_population_equal_solo_within_1e_5() -> None:
    short = [Plan(p.lora, p.training.model_copy(update={"max_steps": 1, "max_grad_norm": 0}), p.rows) for p in PLANS]
    together = train(short, dtype=torch.float32)
    for one, got in zip(short, together, strict=True):
        wanted = train([one], dtype=torch.float32)[0]
        moments = {name: tensor for name, tensor in wanted.items() if name.startswith("exp_avg/")}
        assert_same({name: got[name] for name in moments}, moments, tolerance=1e-5)


def test_evaluation_keeps_the_best_and_stops_early() -> None:
    model = tiny_model("llama")
    bank = inject_lora(model, LoraConfig(r=4))
    validation = ValidationConfig(eval_strategy="steps", eval_steps=1, early_stopping_patience=2)
    config = TrainingConfig(
        max_steps=200, learning_rate=0.5, warmup_ratio=0, lr_scheduler_type="constant", max_grad_norm=0
    )
    member = Member("m", bank, 0, config, make_rows(1), make_rows(2))
    events: list[Event] = []
    loss_model = LossModel(model, bank, 0)
    Population([member], loss_model, bank, QUIET, validation=validation, observers=[events.append]).train()
    finished = [event for event in events if isinstance(event, Finished)]
    assert finished[0].reason == "no lower loss in 2 evaluations"
    assert member.progress.step == member.progress.best_step + 2
    assert member.restore_best()


class Waiting:
    """Candidates in a fixed order; some of them are ended at a step, as a search would."""

    def __init__(self, plans: list[Plan], pruned_at: dict[int, int] | None = None) -> None:
        self.plans, self.pruned_at = plans, pruned_at or {}
        self.left = list(range(len(plans)))
        self.results: dict[str, dict[str, Tensor]] = {}
        self.statuses: dict[str, str] = {}

    def next(self) -> Candidate | None:
        if not self.left:
            return None
        number = self.left.pop(0)
        one = self.plans[number]
        at = {self.pruned_at[number]} if number in self.pruned_at else ()
        return Candidate(f"m{number}", one.lora, one.training, one.rows, one.rows[:2], at)

    def judge(self, evaluated: Sequence[Member]) -> None:
        for member in evaluated:
            member.progress.status = "pruned"

    def ended(self, members: Sequence[Member]) -> None:
        for member in members:
            if member.progress.status == "finished":
                self.results[member.name] = trained(member)
            self.statuses[member.name] = member.progress.status


def train_queue(
    waiting: Waiting, size: int, observers: Sequence[Callable[[Event], None]] = (), together: int | None = None
) -> Population:
    """Train a queue in ``size`` slots."""
    model = tiny_model("llama", torch.float64)
    bank = LoraBank(model, size)
    bank.reserve([one.lora for one in waiting.plans])
    queue = AdapterQueue(bank, waiting, size)
    population = Population(
        [], LossModel(model, bank, 0), bank, QUIET, queue=queue, together=together, observers=observers
    )
    population.train()
    assert bank.configs == [None] * size
    assert not any(tensor.any() for layer in bank.layers.values() for tensor in (layer.lora_A, layer.lora_B))
    return population


# Of different lengths, so that slots become free at different steps.
QUEUED = [
    Plan(p.lora, p.training.model_copy(update={"max_steps": steps}), p.rows)
    for p, steps in zip(PLANS, (12, 20, 7, 15, 18, 9, 11, 14, 10, 13, 8, 16), strict=True)
]


@cache
def by_itself(number: int) -> dict[str, Tensor]:
    return train([QUEUED[number]])[0]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_refilled_slot_ends_as_if_its_adapter_had_trained_alone(size: int) -> None:
    waiting = Waiting(QUEUED, pruned_at={1: 5, 4: 8})
    train_queue(waiting, size)
    assert waiting.statuses == {f"m{n}": "pruned" if n in (1, 4) else "finished" for n in range(len(QUEUED))}
    for number in range(len(QUEUED)):
        if number not in (1, 4):
            assert_same(waiting.results[f"m{number}"], by_itself(number), tolerance=1e-10)


def test_who_has_ended_is_let_go_before_others_join(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, ended, left = Waiting(QUEUED[:4]), list[ref[Member]](), list[int]()
    enter, leave = waiting.next, waiting.ended

    def counting_next() -> Candidate | None:
        left.append(sum(one() is not None for one in ended))
        return enter()

    def noting_ended(members: Sequence[Member]) -> None:
        ended.extend(map(ref, members))
        leave(members)

    monkeypatch.setattr(waiting, "next", counting_next)
    monkeypatch.setattr(waiting, "ended", noting_ended)
    train_queue(waiting, 2)
    assert len(ended) == 4
    assert not any(left)


def test_the_order_of_the_queue_changes_nothing() -> None:
    waiting = Waiting(QUEUED)
    waiting.left = [6, 2, 7, 0, 11, 5, 8, 3, 9, 1, 10, 4]
    train_queue(waiting, 3)
    for number in range(len(QUEUED)):
        assert_same(waiting.results[f"m{number}"], by_itself(number), tolerance=1e-10)


def test_a_failed_adapter_makes_room_and_leaves_nothing_behind() -> None:
    waiting, failed = Waiting(QUEUED[:4]), list[Event]()
    model = tiny_model("llama", torch.float64)
    bank = LoraBank(model, 2)
    bank.reserve([one.lora for one in waiting.plans])
    queue = AdapterQueue(bank, waiting, 2)

    def poison(event: Event) -> None:
        if isinstance(event, StepDone) and event.name == "m0" and event.step == 4:
            queue.members[0].views[0].fill_(math.nan)
        failed.extend([event] if isinstance(event, Failed) else [])

    Population([], LossModel(model, bank, 0), bank, QUIET, queue=queue, observers=[poison]).train()
    assert [(event.name, event.step) for event in failed if isinstance(event, Failed)] == [("m0", 5)]
    assert waiting.statuses == {"m0": "failed", "m1": "finished", "m2": "finished", "m3": "finished"}
    for number in (1, 2, 3):
        assert_same(waiting.results[f"m{number}"], by_itself(number), tolerance=1e-10)


def test_out_of_memory_splits_the_passes_and_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LossModel.__call__

    def scarce(self: LossModel, batch: FlatBatch) -> TokenLoss:
        if len(batch.slots) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(self, batch)

    monkeypatch.setattr(LossModel, "__call__", scarce)
    waiting = Waiting(QUEUED)
    population = train_queue(waiting, 8)
    assert population.together == 2
    for number in range(len(QUEUED)):
        assert_same(waiting.results[f"m{number}"], by_itself(number), tolerance=1e-10)


def test_out_of_memory_with_one_adapter_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: LossModel, batch: FlatBatch) -> TokenLoss:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(LossModel, "__call__", none_left)
    with pytest.raises(TrainingError, match="lower per_device_train_batch_size"):
        train_queue(Waiting(QUEUED), 8)


def test_a_layer_that_grows_under_a_training_adapter_is_an_error() -> None:
    model = tiny_model("llama", torch.float64)
    bank = LoraBank(model, 2)
    waiting = Waiting([plan(1, {"r": 2}, {"max_steps": 9}), plan(2, {"r": 1}, {"max_steps": 3}), plan(3, {"r": 8}, {})])
    bank.reserve([one.lora for one in waiting.plans[:2]])
    population = Population([], LossModel(model, bank, 0), bank, QUIET, queue=AdapterQueue(bank, waiting, 2))
    with pytest.raises(TrainingError, match="m0: .* grew while it was training"):
        population.train()


def leak_optimizer(queue: AdapterQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's next adapter goes on with the moments of the one before."""
    before: dict[int, list[Tensor]] = {}
    place, dismiss = queue.place, queue.dismiss

    def leaking_dismiss(members: Sequence[Member]) -> None:
        before.update((member.slot, member.optimizer.exp_avg_sq) for member in members)
        dismiss(members)

    def leaking_place(candidate: Candidate, slot: int) -> Member:
        member = place(candidate, slot)
        for own, moment in zip(member.optimizer.exp_avg_sq, before.get(slot, []), strict=False):
            if moment.shape == own.shape:
                own.copy_(moment)
        return member

    monkeypatch.setattr(queue, "place", leaking_place)
    monkeypatch.setattr(queue, "dismiss", leaking_dismiss)


def keep_start(queue: AdapterQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's next adapter starts where the one before ended."""
    monkeypatch.setattr(LoraLinear, "clear", lambda self, slot: None)
    monkeypatch.setitem(STARTS, "default", lambda fresh: None)


def unmask_padding(queue: AdapterQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows past a slot's rank hold something and take part."""
    place, segment = queue.place, LoraLinear.segment

    def unmasked(layer: LoraLinear, one: Segment) -> LoraSegment:
        return segment(layer, one)._replace(rank=layer.lora_A.shape[1])

    def filling(candidate: Candidate, slot: int) -> Member:
        member = place(candidate, slot)
        for layer in queue.bank.layers.values():
            layer.lora_A.data[slot, layer.ranks[slot] :] = 0.1
            layer.lora_B.data[slot, layer.ranks[slot] :] = 0.1
        return member

    monkeypatch.setattr(LoraLinear, "segment", unmasked)
    monkeypatch.setattr(queue, "place", filling)


@pytest.mark.parametrize("sabotage", [leak_optimizer, keep_start, unmask_padding])
def test_these_tests_see_what_leaks_from_one_adapter_into_the_next(
    sabotage: Callable[[AdapterQueue, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [plan(1, {"r": 2}, {"max_steps": 4}), plan(2, {"r": 2}, {"max_steps": 4})]
    model = tiny_model("llama", torch.float64)
    bank, waiting = LoraBank(model, 1), Waiting(plans)
    bank.reserve([LoraConfig(r=3)])
    queue = AdapterQueue(bank, waiting, 1)
    wanted = train([plans[1]])[0]
    sabotage(queue, monkeypatch)

    def train_and_compare() -> None:
        Population([], LossModel(model, bank, 0), bank, QUIET, queue=queue).train()
        assert_same(waiting.results["m1"], wanted, tolerance=1e-3)

    with pytest.raises(AssertionError, match="relative|padding"):
        train_and_compare()
