"""LoRA of the embedding of tokens: what it computes, how it starts, and that it crosses over to PEFT and back."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, HubertConfig, HubertForCTC

from lorafleet.config import LoraConfig
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.files.adapter import load_adapter
from lorafleet.files.deployability import deployability
from lorafleet.files.inspection import inspect
from lorafleet.lora import LoraBank, LoraLinear, Routing, find_targets, inject_lora
from lorafleet.lora.routing import Router
from tests.files.test_peft_interop import (
    NAMES,
    assert_close,
    bank_logits,
    crosses_over,
    filled_bank,
    logits,
    randomize,
    save,
)
from tests.tiny import ARCHITECTURES, tiny_model

TABLES = {"gpt2": "wte", "gpt_neox": "embed_in"}
SHAPES: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def knobs(arch: str, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": [NAMES[arch][0], TABLES.get(arch, "embed_tokens")], **more}


def table(bank: LoraBank) -> LoraLinear:
    return next(layer for layer in bank.layers.values() if layer.embeds)


def test_a_lookup_is_the_linear_map_of_one_hot_rows() -> None:
    """Output and gradients of two slots and the base, in float64, against a linear layer of the same weights."""
    torch.manual_seed(0)
    base = nn.Embedding(11, 6, dtype=torch.float64)
    straight = nn.Linear(11, 6, bias=False, dtype=torch.float64)
    straight.weight.data.copy_(base.weight.T)
    router, ids, aim = Router(), torch.tensor([[1, 4, 4], [9, 0, 1]]), torch.randn(2, 3, 6, dtype=torch.float64)
    results = []
    for layer, x in ((base, ids), (straight, F.one_hot(ids, 11).to(torch.float64))):
        torch.manual_seed(1)
        lora = LoraLinear(layer, num_slots=2, r=3, router=router)
        for slot, rank in ((0, 3), (1, 2)):
            lora.fill(slot, rank, 0.5 + slot, 0.0)
            for part in lora.factors(slot):
                part.copy_(torch.randn(part.shape))
        with router.using(Routing((1, -1, 0), (2, 1, 3))):
            y = lora(x)
            (y * aim).sum().backward()
        results.append((y.detach(), lora.lora_A.grad, lora.lora_B.grad))
    for found, wanted in zip(*results, strict=True):
        assert found is not None and wanted is not None
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert results[0][1] is not None and not results[0][1][1, 2:].any()  # past the rank


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_is_adapted_where_it_is_named_and_a_fresh_adapter_changes_nothing(arch: str) -> None:
    assert not any(isinstance(m, nn.Embedding) for m in find_targets(tiny_model(arch), LoraConfig()).values())
    wanted = logits(tiny_model(arch))
    for fields in (*SHAPES.values(), {"init_lora_weights": "gaussian"}):
        bank = inject_lora(tiny_model(arch), LoraConfig(**knobs(arch, **fields)))
        assert table(bank).lora_B.any() and not table(bank).lora_A.any()
        assert torch.equal(bank_logits(bank), wanted)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_table_itself_changes_nothing_either(start: str) -> None:
    bank = inject_lora(tiny_model("llama"), LoraConfig(**knobs("llama", init_lora_weights=start)))
    assert table(bank).lora_A.any() and table(bank).trained_ranks == [4]
    assert_close(bank_logits(bank), logits(tiny_model("llama")))
    bank.model(torch.tensor([[5, 9]])).logits.square().sum().backward()
    grads = [one.grad for one in (table(bank).lora_A, table(bank).lora_B)]  # anybody's optimizer leaves the start alone
    assert all(grad is not None and grad[0, :4].any() and not grad[0, 4:].any() for grad in grads)
    before = bank.state_dict(0)
    for one in bank.slot_parameters(0).values():
        one.value.add_(1)
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    assert torch.equal(bank.state_dict(0)[name][:4], before[name][:4] + 1)
    assert torch.equal(bank.state_dict(0)[name][4:], before[name][4:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ours_in_peft_and_back(arch: str, shape: str, tmp_path: Path) -> None:
    crosses_over(arch, LoraConfig(**knobs(arch, **SHAPES[shape])), tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pefts_here(arch: str, shape: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **knobs(arch, **SHAPES[shape]))
    _pefts_is_read(arch, config, tmp_path)


@pytest.mark.parametrize("arch", ["llama", "phi"])
def test_a_head_that_peft_saved_beside_its_adapter_is_read(arch: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    tensors = _pefts_is_read(arch, config, tmp_path)
    brought = {name.rpartition(".")[2] for name in tensors if ".base_layer." in name}
    assert brought == ({"weight", "bias"} if arch == "phi" else {"weight"})
    found = inspect(str(tmp_path))
    assert found.trainable_parameters == sum(t.numel() for name, t in tensors.items() if ".lora_" in name)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)])
def test_a_table_in_another_precision_is_the_same(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    own, theirs = dtypes
    bank = inject_lora(tiny_model("llama", own), LoraConfig(**knobs("llama")))
    table(bank).weight.data[0, :3] = torch.tensor([1e-7, 1.001, 3.0])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    bank.load_state_dict(0, bank.state_dict(0) | {name: table(bank).weight.to(theirs)})


def _fresh_peft(arch: str) -> peft.PeftModel:
    return peft.get_peft_model(tiny_model(arch), peft.LoraConfig(task_type="CAUSAL_LM", **knobs(arch)))


def _pefts_is_read(arch: str, config: peft.LoraConfig, folder: Path) -> dict[str, Tensor]:
    """Saved as PEFT saves by itself: it adds the base's own table or head where it knows the name."""
    model = peft.get_peft_model(tiny_model(arch), config)
    state = randomize(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    peft.set_peft_model_state_dict(model, state)
    model.eval().save_pretrained(folder)
    adapter = load_adapter(folder)
    bank = inject_lora(tiny_model(arch), adapter.config)
    bank.load_state_dict(0, adapter.tensors)
    assert_close(bank_logits(bank), logits(model))
    return adapter.tensors


@pytest.mark.parametrize("change", ["other values", "more rows"])
def test_a_table_that_was_changed_or_resized_is_refused(change: str) -> None:
    bank = filled_bank("llama", LoraConfig(**knobs("llama")))
    weight = table(bank).weight + 1
    if change == "more rows":
        weight = torch.cat([table(bank).weight, weight[:1]])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight differs from the base's"):
        bank.load_state_dict(0, bank.state_dict(0) | {name: weight})


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_is_unmerged_and_a_tied_head_stays(shape: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    base = model.lm_head.weight.clone()
    bank = inject_lora(model, LoraConfig(**knobs("llama", **SHAPES[shape])))
    for number, one in enumerate(bank.slot_parameters(0).values()):
        generator = torch.Generator().manual_seed(number)
        one.value.add_(torch.randn(one.value.shape, generator=generator), alpha=0.3)
    wanted = bank_logits(bank)
    bank.merge(0)
    assert_close(bank_logits(bank), wanted)
    assert torch.equal(model.lm_head.weight, base)
    bank.unmerge()
    assert torch.equal(bank_logits(bank), wanted) and table(bank).weight is model.lm_head.weight


def test_a_table_that_scales_what_is_looked_up(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma3_text", vocab_size=512, num_key_value_heads=2, head_dim=8, **shape)

    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    lora = LoraConfig(r=4, target_modules=["embed_tokens"])
    bank = inject_lora(model(), lora)
    bank.load_state_dict(0, {name: t + 0.1 for name, t in bank.state_dict(0).items()})
    assert float(bank.model.model.embed_tokens.base_layer.embed_scale) == pytest.approx(32**0.5)
    save(bank, lora, tmp_path)
    assert_close(logits(peft.PeftModel.from_pretrained(model(), tmp_path)), bank_logits(bank))


def test_embeddings_of_positions_are_no_target() -> None:
    with pytest.raises(ConfigError, match="'wpe' matches no linear layer.*wte"):
        find_targets(tiny_model("gpt2"), LoraConfig(target_modules=["wpe"]))


def test_a_model_without_a_table_has_none() -> None:
    config = HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    assert list(find_targets(HubertForCTC(config), LoraConfig(target_modules=["q_proj"])))


def test_the_padding_id_learns_nothing_as_in_peft() -> None:
    """Its row of the table would get no gradient either."""
    model = tiny_model("llama")
    pad = model.get_input_embeddings().padding_idx
    assert pad is not None
    ids = torch.tensor([[5, pad, 9, pad]])
    grads = []
    for adapted in (inject_lora(model, LoraConfig(**knobs("llama"))).model, _fresh_peft("llama")):
        adapted(ids).logits.square().mean().backward()
        grads.append([p.grad for name, p in adapted.named_parameters() if "embed" in name and p.grad is not None])
    ours = grads[0][0]
    assert ours[0, :, 5].any() and ours[0, :, 9].any() and not ours[0, :, pad].any()
    theirs = next(grad for grad in grads[1] if grad.shape == ours[0].shape)
    assert theirs[:, 5].any() and not theirs[:, pad].any()


def test_who_can_serve_it() -> None:
    found = deployability(LoraConfig(), ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
    assert "model.embed_tokens" in found["vllm"][0]
    assert "model.embed_tokens where the base has one matrix for both ends" in found["llama.cpp"][0]
    assert found["peft"] == []


def test_it_trains_beside_a_neighbour_as_alone() -> None:
    """Two slots in one batch: the gradients of each are those of its own rows."""
    ids = torch.tensor([[5, 9, 200, 33, 9, 5, 3, 18]])

    def gradients(slots: tuple[int, ...], lengths: tuple[int, ...], rows: Tensor) -> dict[str, Tensor | None]:
        bank = inject_lora(tiny_model("llama", torch.float64), [LoraConfig(**knobs("llama"))] * 2)
        for slot in range(2):
            bank.load_state_dict(slot, {name: t + 0.1 for name, t in bank.state_dict(slot).items()})
        with bank.route(Routing(slots, lengths)):
            bank.model(rows).logits.square().sum().backward()
        return {name: one.grad for name, one in bank.slot_parameters(0).items() if "embedding" in name}

    alone = gradients((0,), (4,), ids[:, :4])
    # The rows of a batch see each other's tokens unless they stand in rows of their own.
    beside = gradients((0, 1), (4, 4), ids.view(2, 4))
    assert len(alone) == 2
    for name, grad in alone.items():
        torch.testing.assert_close(beside[name], grad, rtol=1e-10, atol=1e-10)
