"""The contracts of a bank on whole models."""

import pytest
import torch
from torch import Tensor, nn

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, ConfigError, RoutingError
from lorafleet.lora import LoraBank, LoraLinear, Routing, inject_lora
from tests.tiny import ARCHITECTURES, tiny_model

IDS = torch.arange(3, 27).view(2, 12)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def fill(bank: LoraBank, slot: int, seed: int = 0, std: float = 0.1) -> None:
    """Give a slot values as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.slot_parameters(slot).values():
        value = parameter.value
        value += std * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    for layer in bank.layers.values():  # the rank padding stays zero
        layer.lora_A.data[slot, layer.ranks[slot] :] = 0
        layer.lora_B.data[slot, layer.ranks[slot] :] = 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_fresh_adapter_leaves_the_output_bitwise(arch: str) -> None:
    model = tiny_model(arch)
    before = logits(model)
    inject_lora(model, [LoraConfig(bias="all", modules_to_save=["lm_head"]), LoraConfig(r=3)])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_equals_unmerged_and_unmerge_restores_the_base(arch: str) -> None:
    model = tiny_model(arch)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bank = inject_lora(model, LoraConfig(use_rslora=True, bias="lora_only"))
    fill(bank, 0)
    unmerged = logits(model)
    bank.merge(0)
    merged = logits(model)
    assert (merged - unmerged).abs().max() / unmerged.abs().max() <= 1e-5
    with pytest.raises(AdapterError, match="slot 0 is merged already"):
        bank.merge(0)
    with pytest.raises(AdapterError, match="unmerge to use the base alone"), bank.disabled():
        pass
    bank.unmerge()
    assert torch.equal(logits(model), unmerged)
    state = model.state_dict()
    assert all(
        torch.equal(tensor, state.get(name, state.get(_wrapped(name), tensor * 0 - 1))) for name, tensor in base.items()
    )
    with pytest.raises(AdapterError, match="nothing is merged"):
        bank.unmerge()


def _wrapped(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def test_disabled_is_the_base_bitwise() -> None:
    model = tiny_model("gpt2")
    before = logits(model)
    bank = inject_lora(model, LoraConfig(bias="all", modules_to_save=["wte"]))
    fill(bank, 0)
    assert not torch.equal(logits(model), before)
    with bank.disabled():
        assert torch.equal(logits(model), before)


CONFIGS = [
    LoraConfig(r=4),
    LoraConfig(r=2, lora_alpha=8, target_modules="attention", rank_pattern={"q_proj": 5}),
    LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 3}),
    LoraConfig(r=1, target_modules="mlp", modules_to_save=["lm_head"], layers_to_transform=[1]),
]


def test_mixed_slots_in_one_batch_equal_each_alone() -> None:
    model = tiny_model("llama", torch.float64)
    bank = inject_lora(model, CONFIGS)
    for slot in range(len(CONFIGS)):
        fill(bank, slot, seed=slot)
    ids = torch.arange(3, 3 + 5 * 9).view(5, 9)
    slots = (2, -1, 0, 3, 1)
    with bank.route(Routing(slots, (1,) * 5, unit="rows")):
        mixed = logits(model, ids)
    for row, slot in enumerate(slots):
        with bank.route(Routing((slot,), (9,))):
            alone = logits(model, ids[row : row + 1])[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-10, atol=1e-10)


def test_gradients_of_a_population_equal_each_alone() -> None:
    ids = torch.arange(3, 3 + 4 * 9).view(4, 9)

    def grads(slots: tuple[int, ...]) -> dict[int, dict[str, Tensor]]:
        model = tiny_model("llama", torch.float64)
        bank = inject_lora(model, CONFIGS)
        for slot in range(len(CONFIGS)):
            fill(bank, slot, seed=slot)
        with bank.route(Routing(slots, (1,) * len(slots), unit="rows")):
            model(input_ids=ids[list(slots)]).logits.square().sum().backward()
        return {
            slot: {n: p.grad.clone() for n, p in bank.slot_parameters(slot).items() if p.grad is not None}
            for slot in slots
        }

    together = grads((0, 1, 2, 3))
    for slot in range(4):
        for name, grad in grads((slot,))[slot].items():
            torch.testing.assert_close(together[slot][name], grad, rtol=1e-10, atol=1e-10, msg=name)


def test_removal_leaves_nothing_behind_and_a_refill_is_fresh() -> None:
    model = tiny_model("opt")
    bank = inject_lora(model, [LoraConfig(bias="all"), LoraConfig()])
    fresh = bank.state_dict(0)
    neighbour = bank.state_dict(1)
    fill(bank, 0)
    bank.remove(0)
    with pytest.raises(RoutingError, match="slot 0, which holds no adapter"), bank.route(Routing((0,), (1,))):
        pass
    assert bank.add(LoraConfig(bias="all"), seed=0) == 0
    assert all(torch.equal(tensor, bank.state_dict(0)[name]) for name, tensor in fresh.items())
    assert all(torch.equal(tensor, bank.state_dict(1)[name]) for name, tensor in neighbour.items())


def test_a_slot_grows_for_a_larger_rank_and_keeps_its_neighbours() -> None:
    model = tiny_model("llama")
    bank = inject_lora(model, LoraConfig(r=2))
    fill(bank, 0)
    before = logits(model)
    assert bank.add(LoraConfig(r=7, target_modules="all-linear")) == 1
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


def test_state_dict_round_trip_with_modules_and_biases() -> None:
    config = LoraConfig(bias="all", modules_to_save=["lm_head"], rank_pattern={"fc1": 2})
    model = tiny_model("opt")
    bank = inject_lora(model, config)
    fill(bank, 0)
    tensors, wanted = bank.state_dict(0), logits(model)
    other_model = tiny_model("opt")
    other = inject_lora(other_model, config, seed=9)
    other.load_state_dict(0, tensors)
    torch.testing.assert_close(logits(other_model), wanted, rtol=1e-5, atol=1e-5)


def test_load_lists_every_fault() -> None:
    bank = inject_lora(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(AdapterError, match=r"(?s)2 faults.*missing .*lora_B.*lora_A.weight is \(1, 1\)"):
        bank.load_state_dict(0, {name: torch.zeros(1, 1)})
    with pytest.raises(AdapterError, match="surplus .*did you mean"):
        bank.load_state_dict(0, {**bank.state_dict(0), name.replace("lora_A", "lora_C"): torch.zeros(1, 1)})


SAVES_HEAD = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
TARGETS_HEAD = LoraConfig(r=3, target_modules=["q_proj", "k_proj", "lm_head"])
NARROW = LoraConfig(r=1, target_modules=["q_proj", "v_proj"])


def trained(config: LoraConfig, arch: str = "llama") -> dict[str, Tensor]:
    """Tensors of an adapter as a file has them."""
    bank = inject_lora(tiny_model(arch), config)
    fill(bank, 0)
    return bank.state_dict(0)


def answers_as_alone(bank: LoraBank, slot: int, config: LoraConfig) -> None:
    """A slot's adapter answers as on a base of its own."""
    with bank.route(Routing((slot,), (24,))):
        found = logits(bank.model)
    alone = tiny_model("llama")
    LoraBank(alone, 1).load(0, config, trained(config))
    torch.testing.assert_close(found, logits(alone), rtol=1e-6, atol=1e-6)


def test_an_adapter_that_is_refused_leaves_nothing_in_its_slot() -> None:
    model = tiny_model("llama")
    before = logits(model)
    bank = LoraBank(model, 2)
    bank.load(0, SAVES_HEAD, trained(SAVES_HEAD))
    with pytest.raises(AdapterError, match="lm_head is in modules_to_save of another slot"):
        bank.load(1, TARGETS_HEAD, trained(TARGETS_HEAD))
    with pytest.raises(AdapterError, match="lm_head is in modules_to_save of another slot"):
        bank.add(TARGETS_HEAD, slot=1)
    bank.load(1, NARROW, trained(NARROW))
    assert bank.state_dict(1).keys() == trained(NARROW).keys()
    # Once the adapter with a copy of the head has left, the other may come.
    bank.remove(0)
    bank.load(0, TARGETS_HEAD, trained(TARGETS_HEAD))
    answers_as_alone(bank, 0, TARGETS_HEAD)
    with bank.disabled():
        assert torch.equal(logits(model), before)


def test_a_module_may_be_saved_once_nobody_adapts_it() -> None:
    model = tiny_model("llama")
    before = logits(model)
    bank = LoraBank(model, 2)
    bank.load(0, TARGETS_HEAD, trained(TARGETS_HEAD))
    with pytest.raises(AdapterError, match="lm_head holds layers that another slot adapts"):
        bank.load(1, SAVES_HEAD, trained(SAVES_HEAD))
    bank.remove(0)
    bank.load(1, SAVES_HEAD, trained(SAVES_HEAD))
    answers_as_alone(bank, 1, SAVES_HEAD)
    with bank.disabled():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("lorafleet.lora.layer.LoraLinear.train_bias", MemoryError),  # by then A, B and the head are there
        ("lorafleet.lora.saved.SlotModule.add", KeyboardInterrupt),
        ("lorafleet.lora.bank.fill", torch.OutOfMemoryError),
    ],
)
def test_an_entry_that_breaks_off_leaves_its_slot_free(
    place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise error

    wide = LoraConfig(r=4, bias="all", modules_to_save=["lm_head"])
    bank, tensors = LoraBank(tiny_model("qwen2"), 1), trained(wide, "qwen2")
    with monkeypatch.context() as patched:
        patched.setattr(place, broken)
        with pytest.raises(error):
            bank.load(0, wide, tensors)
    assert bank.configs == [None]
    bank.load(0, NARROW, trained(NARROW, "qwen2"))


def test_wrapping_twice_is_an_error() -> None:
    model = tiny_model("llama")
    bank = inject_lora(model, LoraConfig())
    with pytest.raises(AdapterError, match="carries a lorafleet bank already"):
        inject_lora(model, LoraConfig())
    with pytest.raises(AdapterError, match="LoraLinear already"):
        LoraLinear(next(iter(bank.layers.values())))


def test_a_routing_that_does_not_cover_the_batch_raises() -> None:
    model = tiny_model("llama")
    bank = inject_lora(model, LoraConfig())
    with pytest.raises(RoutingError, match="covers 23 tokens, the batch has 24"), bank.route(Routing((0,), (23,))):
        logits(model)
    with pytest.raises(RoutingError, match="slot 4"), bank.route(Routing((4,), (24,))):
        pass


def test_unknown_targets_name_the_layers_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'q_porj' matches no linear layer.*did you mean 'q_proj'.*k_proj"):
        inject_lora(tiny_model("llama"), LoraConfig(target_modules=["q_porj"]))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("q_proj, v_proj", {"q_proj", "v_proj"}),
        (r".*layers\.1\..*_proj", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_targets_by_shorthand_name_and_regex(targets: str, found: set[str]) -> None:
    bank = inject_lora(tiny_model("llama"), LoraConfig(target_modules=targets))
    assert {path.rsplit(".", 1)[-1] for path in bank.layers} == found


@pytest.mark.parametrize("fast", [False, True])
def test_checkpoint_recomputation_uses_the_routing_of_the_forward(fast: bool) -> None:
    def run(checkpointed: bool) -> list[Tensor]:
        model = tiny_model("llama", torch.float64)
        bank = inject_lora(model, CONFIGS[:2])
        for slot in range(2):
            fill(bank, slot)
        if fast:
            bank.speed_up(lambda: model(input_ids=IDS))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": bank.checkpoint_contexts})
            model.train()
        with bank.route(Routing((1, 0), (1, 1), unit="rows")):
            loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
        loss.backward()  # outside the routing on purpose
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-10)


def test_a_saved_module_holds_what_is_inside_it() -> None:
    bank = inject_lora(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"])
    )
    assert sorted(bank.saved) == ["model.layers.0.mlp", "model.layers.1.mlp"]
