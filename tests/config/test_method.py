"""Methods in words."""

import pytest

from lorafleet.config.method import MethodSpec, parse_methods
from lorafleet.errors import ConfigError


def test_methods_and_their_options() -> None:
    assert parse_methods("full,lora:r=8,lora_alpha=32,lora:r=16, prefix ,bottleneck:style=houlsby") == [
        MethodSpec("full", "full", {}),
        MethodSpec("lora:r=8,lora_alpha=32", "lora", {"r": 8, "lora_alpha": 32}),
        MethodSpec("lora:r=16", "lora", {"r": 16}),
        MethodSpec("prefix", "prefix", {}),
        MethodSpec("bottleneck:style=houlsby", "bottleneck", {"style": "houlsby"}),
    ]


def test_values_are_yaml_and_lists_stay_whole() -> None:
    (spec,) = parse_methods("IA3:target-modules=[k_proj, down_proj],feedforward_modules=[down_proj],init=false")
    assert spec.kind == "ia3"
    assert spec.options == {
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "init": False,
    }


def test_a_list_of_texts_is_the_same() -> None:
    assert parse_methods(["full", "lora:r=8,lora_alpha=32"]) == parse_methods("full,lora:r=8,lora_alpha=32")


def test_a_variant_is_lora_with_an_option_that_can_be_changed() -> None:
    assert parse_methods("dora:r=4")[0] == MethodSpec("dora:r=4", "lora", {"use_dora": True, "r": 4})
    assert parse_methods("loraplus:loraplus_lr_ratio=8")[0].options == {"loraplus_lr_ratio": 8}


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError, match="5 faults") as caught:
        parse_methods("r=8,full,full,lora:r=8,r=9,prefix:tokens,bottleneck:style=[a")
    for fault in (
        "'r=8' begins with an option",
        "'full' is named twice",
        "r is given twice",
        "'tokens' is no option; write name=value",
        "'\\[a' cannot be read",
    ):
        assert caught.match(fault)


def test_no_method() -> None:
    with pytest.raises(ConfigError, match="no method is named"):
        parse_methods(" , ")
