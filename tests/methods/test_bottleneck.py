"""Bottleneck adapters against the papers' definitions: places, counts and forward pass, written out by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lorafleet.config.bottleneck import BottleneckConfig
from lorafleet.config.training import RunConfig, TrainingConfig
from lorafleet.errors import AdapterError, ModelError, RoutingError
from lorafleet.evaluation.token_loss import LossModel
from lorafleet.lora import Routing
from lorafleet.methods.bottleneck import BottleneckAdapter, find_places
from lorafleet.training.loop import Population
from lorafleet.training.member import Member
from tests.evaluation.test_token_loss import make_rows, plain_losses
from tests.tiny import ARCHITECTURES, tiny_model

IDS = torch.tensor([[5, 9, 200, 33, 71, 400, 3, 18]])
LAST = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}
D, M, LAYERS = 32, 6, 2


class ByHand(nn.Module):
    """The adapter behind a layer, as the papers draw it."""

    def __init__(self, layer: nn.Module, tensors: dict[str, Tensor], path: str) -> None:
        super().__init__()
        self.layer = layer
        self.values = nn.ParameterDict({n.replace(".", "_"): tensors[f"{path}.{n}"].clone() for n in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        h, v = self.layer(x), self.values
        low = h @ v["down_weight"].T + v["down_bias"]
        active = 0.5 * low * (1 + torch.erf(low / 2**0.5))
        return h + active @ v["up_weight"].T + v["up_bias"]


NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


def config(style: str) -> BottleneckConfig:
    return BottleneckConfig.model_validate({"style": style, "bottleneck_size": M})


def by_hand(arch: str, tensors: dict[str, Tensor]) -> nn.Module:
    model = tiny_model(arch, torch.float64).requires_grad_(False)
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in tensors):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, ByHand(model.get_submodule(path), tensors, path))
    return model


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_places_and_counts_are_the_papers(arch: str, style: str) -> None:
    adapter = BottleneckAdapter(tiny_model(arch), config(style))
    attention, mlp = LAST.get(arch, LAST["llama"])
    ends = [attention, mlp] if style == "houlsby" else [mlp]
    assert len(adapter.bottlenecks) == LAYERS * len(ends)
    assert all(any(path.endswith(f".{end}") for end in ends) for path in adapter.bottlenecks)
    count = sum(one.value.numel() for one in adapter.slot_parameters(0).values())
    # Houlsby et al., section 2.1: 2md + d + m parameters an adapter, two in a block; Pfeiffer et al.: one.
    assert count == LAYERS * len(ends) * (2 * M * D + D + M)
    with torch.no_grad():
        assert torch.equal(adapter.model(IDS).logits, tiny_model(arch)(IDS).logits)


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_forward_and_training_equal_the_definition(arch: str, style: str) -> None:
    rows = make_rows(3, (7, 5, 9, 6), prompt=3)
    adapter = BottleneckAdapter(tiny_model(arch, torch.float64), config(style), seed=3)
    for number, one in enumerate(adapter.slot_parameters(0).values()):
        generator = torch.Generator().manual_seed(number)
        one.value.add_(0.2 * torch.randn(one.value.shape, generator=generator, dtype=torch.float64))
    model = by_hand(arch, adapter.state_dict(0))
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)
        with adapter.disabled():
            assert torch.equal(adapter.model(IDS).logits, tiny_model(arch, torch.float64)(IDS).logits)

    values = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
    training = TrainingConfig(**values, per_device_train_batch_size=4, max_steps=3)
    member = Member("bottleneck", adapter, 0, training, rows)
    run = RunConfig(output_dir="unused", save_strategy="no")
    Population([member], LossModel(adapter.model, adapter, 0), adapter, run).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        (torch.stack(plain_losses(model, rows)).sum() / sum(int(row.loss_mask[1:].sum()) for row in rows)).backward()
        optimizer.step()
    for name, tensor in adapter.state_dict(0).items():
        path, first, second = name.rsplit(".", 2)
        wanted = model.get_submodule(path).values[f"{first}_{second}"]
        torch.testing.assert_close(tensor, wanted.detach(), rtol=1e-5, atol=1e-7)


def test_the_start_follows_from_the_seed() -> None:
    first, second, other = (BottleneckAdapter(tiny_model("llama"), config("houlsby"), seed=s) for s in (1, 1, 2))
    for name, tensor in first.state_dict(0).items():
        assert torch.equal(tensor, second.state_dict(0)[name])
        assert torch.equal(tensor, other.state_dict(0)[name]) == (not name.endswith("down.weight"))


def test_what_does_not_fit_is_named() -> None:
    adapter = BottleneckAdapter(tiny_model("llama"), config("pfeiffer"))
    with pytest.raises(RoutingError, match=r"slot 0 or of the base, not of \[-1, 0\]"):
        adapter.route(Routing((0, -1), (3, 4)))
    state = adapter.state_dict(0)
    state.pop("model.layers.0.mlp.down_proj.up.bias")
    with pytest.raises(AdapterError, match=r"missing model.layers.0.mlp.down_proj.up.bias \(32,\)"):
        adapter.load_state_dict(0, state)
    with pytest.raises(AdapterError, match="slot 0 alone, not 1"):
        adapter.slot_parameters(1)


def test_a_block_without_a_last_layer_is_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Identity()
        layer.mlp.forward = lambda x: x * 0
    with pytest.raises(ModelError, match=r"(?s)block 0: no last linear layer of its MLP that gives 32; none.*block 1"):
        find_places(model, config("pfeiffer"))
