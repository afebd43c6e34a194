"""Methods by their words: what they are, and every fault before anything is loaded."""

import pytest

from lorafleet.config.bottleneck import BottleneckConfig
from lorafleet.config.lora import LoraConfig
from lorafleet.config.method import parse_methods
from lorafleet.config.training import TrainingConfig
from lorafleet.errors import ConfigError
from lorafleet.methods.method import Method, find_methods, methods


def find(text: str, lora: LoraConfig | None = None, training: TrainingConfig | None = None) -> list[Method]:
    return find_methods(parse_methods(text), lora or LoraConfig(), training or TrainingConfig())


def test_each_kind_has_its_own_settings() -> None:
    full, lora, bottleneck, prefix = find("full,lora:r=4,bottleneck:bottleneck_size=16,prefix:num_virtual_tokens=7")
    assert (full.kind, full.config, full.options) == ("full", None, {})
    assert lora.config == LoraConfig(r=4)
    assert bottleneck.config == BottleneckConfig(bottleneck_size=16)
    assert prefix.kind == "prefix_tuning" and prefix.options["num_virtual_tokens"] == 7


def test_given_knobs_hold_for_all_methods_and_a_method_s_own_for_it_alone() -> None:
    lora, dora = find("lora,dora:r=2,learning_rate=1e-3", LoraConfig(r=32, lora_dropout=0.1), TrainingConfig(seed=7))
    assert lora.config == LoraConfig(r=32, lora_dropout=0.1)
    assert dora.config == LoraConfig(r=2, lora_dropout=0.1, use_dora=True)
    assert (lora.training.seed, dora.training.seed, dora.training.learning_rate) == (7, 7, 1e-3)


def test_a_learning_rate_that_nobody_gave_suits_the_method() -> None:
    full, prefix, lora = find("full,prefix:num_virtual_tokens=4,lora")
    assert full.training.learning_rate < lora.training.learning_rate < prefix.training.learning_rate
    (given,) = find("full", training=TrainingConfig(learning_rate=3e-4))
    assert given.training.learning_rate == 3e-4


def test_all_faults_of_all_methods_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        find("lorra,lora:rnk=8,full:r=8,prefix:num_virtual_token=3,adalora,bottleneck:style=pfeifer,lora:r=0")
    for fault in (
        "method lorra: there is no such method; did you mean 'lora'",
        "method lora:rnk=8: unknown key 'rnk'; did you mean 'rank'",
        "method full:r=8: unknown key 'r'",
        "num_virtual_token is no option of prefix_tuning; did you mean 'num_virtual_tokens'",
        "method adalora: it moves ranks between layers",
        "style = 'pfeifer'.*did you mean 'pfeiffer'",
        "method lora:r=0: r = 0",
    ):
        assert caught.match(fault)


def test_every_name_is_a_method() -> None:
    names = methods()
    assert {"lora", "dora", "full", "bottleneck", "bitfit", "prefix", "ia3"} <= {*names}
    assert "adalora" not in names
