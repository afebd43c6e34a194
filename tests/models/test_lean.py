"""Layers without transformers' modules answer as the decoder does, and step aside where they would not."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafleet.models.lean as module
from lorafleet.config import GenerationConfig, LoraConfig
from lorafleet.data.batches import Part, collate
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.generation.decoder import Decoder
from lorafleet.generation.request import Request
from lorafleet.lora import LoraBank, inject_lora
from lorafleet.models.attention import FlatLayout, flat_inputs, use_cached_attention
from lorafleet.models.cached_attention import CachedLayout, KeyValueCache
from lorafleet.models.head import plain_decoder
from lorafleet.models.lean import LeanLayers, lean
from lorafleet.models.load import Base
from tests.evaluation.test_token_loss import make_rows
from tests.generation.tiny_bank import tiny_base, trained_bank
from tests.lora.test_bank import fill
from tests.tiny import ARCHITECTURES

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
PROMPTS = [[5, 9, 7], [40, 41, 42, 43, 44, 45, 46, 47], [300], [12, 13, 14, 15, 16]]


def body_of(base: Base) -> nn.Module:
    assert use_cached_attention(base.model)
    decoder = plain_decoder(base.model)
    assert isinstance(decoder, nn.Module)
    return decoder


def both(base: Base, bank: LoraBank, *, whole: bool) -> list[Tensor]:
    """The hidden states of every step of a mixed decoding, by the layers as found or by the decoder itself."""
    decoder, states = Decoder(base, bank, 3), list[Tensor]()
    body = decoder._body
    assert isinstance(body, LeanLayers)
    called = body.decoder if whole else body

    def record(**inputs: object) -> tuple[Tensor]:
        found: tuple[Tensor] = called(**inputs)
        states.append(found[0])
        return found

    decoder._body = record
    decoder.speed_up()
    for prompt, slot in zip(PROMPTS, [0, -1, 1, 2], strict=True):
        decoder.submit(Request(prompt, slot, GenerationConfig(max_new_tokens=9), 0, frozenset()))
    while decoder.busy:
        decoder.step()
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arch", KNOWN)
def test_layers_equal_the_decoder(arch: str, dtype: torch.dtype) -> None:
    window = {"sliding_window": 6} if arch == "mistral" else {}
    base = tiny_base(arch, dtype, **window)
    bank = trained_bank(base, bias="all" if arch == "qwen2" else "none")
    wanted, found = both(base, bank, whole=True), both(base, bank, whole=False)
    assert len(found) == len(wanted) > 9
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12) * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", KNOWN)
def test_gradients_equal_the_decoders(arch: str, dtype: torch.dtype) -> None:
    base = tiny_base(arch, dtype, **({"sliding_window": 6} if arch == "mistral" else {}))
    bank = trained_bank(base)
    loss_model = LossModel(base.model, bank, 0)
    assert isinstance(loss_model.decoder, LeanLayers)
    loss_model.speed_up()
    assert loss_model.decoder.as_built
    batch, found = collate([Part(slot, make_rows(slot, (5, 9, 9), prompt=3)) for slot in range(3)]), []
    for body in (loss_model.decoder, loss_model.decoder.decoder):
        loss_model.decoder = body
        loss = loss_model(batch).total
        loss.backward()
        parameters = dict.fromkeys(one.parameter for slot in range(3) for one in bank.slot_parameters(slot).values())
        found.append([loss.detach(), *(one.grad.clone() for one in parameters if one.grad is not None)])
        bank.clear_gradients()
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    assert len(found[0]) > 25
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_behind_its_attention_the_last_layer_computes_targets_alone(dropout: float) -> None:
    base = tiny_base("llama", torch.float64)
    bank = inject_lora(base.model, [LoraConfig(r=2), LoraConfig(r=2, modules_to_save=["norm"], lora_dropout=dropout)])
    for slot in range(2):
        fill(bank, slot, seed=slot)
    bank.train()
    loss_model = LossModel(base.model, bank, 0)
    assert isinstance(loss_model.decoder, LeanLayers)
    rows = [make_rows(slot, (5, 9, 9)) for slot in range(3)]
    for row in rows[2]:
        row.loss_mask[:] = False
    batch, tokens = collate([Part(1, rows[0]), Part(0, rows[2]), Part(0, rows[1][:1]), Part(-1, rows[1])]), list[int]()
    for layer in (loss_model.decoder.layers[0], loss_model.decoder.layers[-1]):
        layer.mlp["down_proj"].register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0])))
    found = []
    for body in (loss_model.decoder, loss_model.decoder.decoder):
        loss_model.decoder = body
        loss = loss_model(batch)
        loss.total.backward()
        norm = bank.slot_parameters(1)["model.norm.weight"].grad
        assert norm is not None
        low_A = bank.layers["model.layers.1.mlp.up_proj"].lora_A.grad
        found.append([torch.tensor(loss.parts), loss.total.detach(), norm.clone(), low_A])
        bank.clear_gradients()
    assert tokens[1] == (tokens[0] if dropout else len(batch.targets))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_norms_backward_pass_is_autograds(dtype: torch.dtype, tolerance: float) -> None:
    x = (
        torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
        * torch.logspace(-3, 2, 7).to(dtype)[:, None]
    )
    grad, found = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype), []
    weight = torch.linspace(0.5, 2, 33).to(dtype)
    for norm in (
        lambda x: module._trained_rms_norm(x, weight, 1e-5),
        lambda x: F.rms_norm(x.double(), (33,), weight.double(), 1e-5),
    ):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(grad.to(y.dtype))
        assert leaf.grad is not None
        found.append((y.detach().double(), leaf.grad.double()))
    for one, other in zip(*found, strict=True):
        assert ((one - other).norm(dim=1) <= tolerance * other.norm(dim=1)).all()


def test_a_whole_model_in_training_equals_the_decoder() -> None:
    """Its norms learn, and attention drops."""
    base = tiny_base(dtype=torch.float32, attention_dropout=0.5)
    layers = lean(body_of(base))
    assert isinstance(layers, LeanLayers)
    layers.decoder.train().requires_grad_(True)
    found = []
    for body in (layers, layers.decoder):
        torch.manual_seed(0)
        out = body(**flat_inputs(torch.arange(9)[None], torch.arange(9)[None], FlatLayout((9,))))[0]
        found.append([out, *torch.autograd.grad(out.square().sum(), [*layers.decoder.parameters()])])
    assert not torch.allclose(found[0][0], layers.decoder.eval()(input_ids=torch.arange(9)[None])[0], rtol=0.1)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_half_of_qwen2s_layers_may_have_a_window() -> None:
    knobs = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    base = tiny_base("qwen2", **knobs)
    body = lean(body_of(base))
    assert isinstance(body, LeanLayers)
    assert [layer.window for layer in body.layers] == [None, 4]
    bank = trained_bank(base)
    pairs = zip(both(base, bank, whole=True), both(base, bank, whole=False), strict=True)
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in pairs)


@pytest.mark.parametrize("arch", [one for one in ARCHITECTURES if one not in KNOWN])
def test_other_classes_are_left_alone(arch: str) -> None:
    decoder = body_of(tiny_base(arch))
    assert lean(decoder) is decoder


def test_layers_that_compute_otherwise_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    decoder = body_of(tiny_base())
    monkeypatch.setattr(module, "_turned", lambda x, cos, signed: x * cos)
    assert lean(decoder) is decoder
    assert re.search("LlamaModel runs by its own modules .logits differ by .* relative", caplog.text)


def test_a_class_with_other_modules_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    decoder = body_of(tiny_base("gemma", torch.float32))
    monkeypatch.setitem(module._WINDOWS, module._class_of(decoder), lambda attention: None)
    assert lean(decoder) is decoder
    assert "no attribute 'variance_epsilon'" in caplog.text


def test_listeners_at_the_first_look_are_not_gone_around(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = body_of(tiny_base())
    mlp = decoder.get_submodule("layers.1.mlp")
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: own(x))  # which answers as before
    assert lean(decoder) is decoder


def step(body: LeanLayers, tokens: int = 4) -> Tensor:
    layout = CachedLayout(KeyValueCache(1, tokens), [0], [0], [tokens])
    with torch.no_grad():
        return body(**flat_inputs(torch.arange(5, 5 + tokens)[None], torch.arange(tokens)[None], layout))[0]


@pytest.mark.parametrize(
    "path",
    ["layers.1", "layers.0.mlp", "layers.1.self_attn", "layers.0.mlp.up_proj", "layers.1.input_layernorm", "norm"],
)
def test_hooks_are_heard(path: str) -> None:
    base = tiny_base(dtype=torch.float32)
    body = lean(body_of(base))
    assert isinstance(body, LeanLayers)
    bank, before = trained_bank(base), step(body)
    bank.speed_up(lambda: base.model(input_ids=torch.tensor([[1, 2]]), use_cache=False), training=False)
    heard = list[nn.Module]()
    hook = base.model.get_submodule(f"model.{path}").register_forward_hook(lambda one, *_: heard.append(one))
    after = step(body)
    assert len(heard) == 1
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4)
    hook.remove()
    step(body)
    assert len(heard) == 1


@pytest.mark.parametrize("path", ["layers.1", "layers.0.mlp", "layers.1.self_attn", "layers.1.input_layernorm"])
def test_backward_hooks_are_heard(path: str) -> None:
    layers = lean(body_of(tiny_base(dtype=torch.float32)))
    assert isinstance(layers, LeanLayers)
    heard = list[nn.Module]()
    layers.decoder.get_submodule(path).register_full_backward_hook(lambda one, *_: heard.append(one))
    layers.decoder.requires_grad_(True)
    layers(**flat_inputs(torch.arange(4)[None], torch.arange(4)[None], FlatLayout((4,))))[0].sum().backward()
    assert len(heard) == 1


def test_changes_of_the_model_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    decoder = body_of(base)
    layers = lean(decoder)
    assert isinstance(layers, LeanLayers)
    before, own = step(layers), decoder.get_submodule("layers")
    assert isinstance(own, nn.ModuleList)
    changes = [(own._modules, "1", own[0]), (base.model.config.__dict__, "num_hidden_layers", 1)]
    changes.append((own[1].get_submodule("mlp").__dict__, "forward", lambda x: 0 * x))
    for place, name, value in changes:
        with monkeypatch.context() as change:
            change.setitem(place, name, value)
            assert not torch.allclose(step(layers), before)
        assert torch.equal(step(layers), before)


@pytest.mark.parametrize("name", ["mlp", "input_layernorm", "norm", "embed_tokens"])
def test_modules_of_a_slot_take_part(name: str) -> None:
    base = tiny_base(dtype=torch.float32)
    body = body_of(base)
    layers = lean(body)
    assert isinstance(layers, LeanLayers)
    targets = ["q_proj"] if name == "mlp" else ["gate_proj"]
    bank = trained_bank(base, (2,), target_modules=targets, modules_to_save=[name])
    assert any(path.endswith(name) for path in bank.saved)
    later = lean(body)  # a module that is gone around is no longer the model's
    assert (later is body) == (name == "mlp")
    layout = CachedLayout(KeyValueCache(1, 4), [0], [0], [4])
    with torch.no_grad():
        wanted = body(**flat_inputs(torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None], layout))[0]
    assert torch.allclose(step(layers), wanted, rtol=1e-5, atol=1e-5)


def test_merged_layers_answer_merged() -> None:
    base = tiny_base()
    layers = lean(body_of(base))
    assert isinstance(layers, LeanLayers)
    bank = trained_bank(base)
    bank.speed_up(lambda: base.model(input_ids=torch.tensor([[1, 2]]), use_cache=False), training=False)
    wanted = step(layers, 4)  # without a routing all goes to slot 0
    bank.merge(0)
    found = step(layers, 3)  # of another length, for which nothing is laid out yet
    assert torch.allclose(found, wanted[:, :3], rtol=1e-9, atol=1e-9)
