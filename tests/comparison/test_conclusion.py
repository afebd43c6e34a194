"""The sentences of a comparison, for numbers of every kind."""

from typing import Any

import pytest

from lorafleet.comparison.conclusion import conclusion
from lorafleet.comparison.report import markdown, notes, page
from lorafleet.comparison.result import CompareResult, _rank

ROWS = 200


def row(name: str, right: int, parameters: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    """A method with so many of 200 rows right, the first ones, and the same loss on all of them."""
    speed = {"first_token": 0.1, "single": 10.0, "batch": 40.0}
    return {
        "name": name,
        "kind": name.partition(":")[0],
        "trainable_parameters": parameters,
        "trainable_share": 0.01,
        "optimizer_bytes": 8 * parameters,
        "training_peak_bytes": 2_000_000,
        "training_tokens_per_second": 100.0,
        "padded_tokens_per_second": 80.0,
        "training_seconds": 10.0,
        "steps": 4,
        "tokens": 1000,
        "rates": None,
        "curve": [{"step": 1, "loss": 2.0}],
        "padded": False,
        "storage_bytes": 1000,
        "load_seconds": 0.1,
        "speed": speed,
        "merged_speed": None,
        "quality": {"accuracy": right / ROWS, "loss": loss},
        "intervals": {},
        "general_loss": 3.0,
        "forgetting": 0.0,
        "gaps": [{"rows": 32, "train_loss": 1.0, "eval_loss": 1.5}, {"rows": 900, "train_loss": 1.0, "eval_loss": 1.0}],
        "rows": {
            "label_right": [1.0] * right + [0.0] * (ROWS - right),
            "loss_sum": [loss] * ROWS,
            "loss_tokens": [1] * ROWS,
        },
        **more,
    }


def compared(base: int, *methods: dict[str, Any], **more: Any) -> CompareResult:
    start = row("base", base, 0) | {"dtype": "float32"}
    _rank(start, list(methods), "accuracy")
    fields = {"model": "m", "data": "d", "split": "test", "merit": "accuracy", "forgetting_text": "general"}
    own = {"output_dir": "out", "rows": ROWS, "base": start, "methods": methods, "failed": {}}
    return CompareResult(**(fields | own | more))


FULL, LORA = row("full", 160, 1000), row("lora:r=8", 150, 10)


@pytest.mark.parametrize(
    ("base", "full", "lora", "sentence"),
    [
        (100, 160, 130, "lora, with 1.00% of the trained parameters, reached 50.0% of full fine-tuning's gain."),
        (100, 160, 160, "reached 100.0% of full fine-tuning's gain; the two are within noise of each other."),
        (100, 160, 60, "of the trained parameters, gained nothing: 30.0% beside full fine-tuning's 80.0%."),
        (100, 60, 160, "gained what full fine-tuning did not: 80.0% beside 30.0%."),
        (100, 101, 160, "gained what full fine-tuning did not: 80.0% beside 50.5%."),
        (100, 60, 60, "Neither full fine-tuning (30.0%) nor lora (30.0%) gained anything beyond noise."),
    ],
)
def test_beside_full_fine_tuning(base: int, full: int, lora: int, sentence: str) -> None:
    found = conclusion(compared(base, row("full", full, 1000), row("lora", lora, 10)))
    assert any(sentence in one for one in found), found


def test_of_equals_the_smallest_is_named() -> None:
    found = conclusion(compared(100, row("full", 160, 1000), row("lora", 160, 10), row("ia3", 100, 1)))
    assert found[0].startswith("On 200 test rows lora has the best accuracy: 80.0%; the base's is 50.0%.")
    assert found[1] == "Within noise of it: full. Of all these lora trains the fewest parameters, 10."


def test_a_best_that_is_no_better_than_the_base_is_told_so() -> None:
    (first, *_) = conclusion(compared(100, row("lora", 101, 10)))
    assert first.endswith("the base's is 50.0%, which is within noise of it.")


def test_what_accuracy_cannot_tell_loss_may() -> None:
    methods = (row("full", 103, 1000, 0.5), row("lora", 101, 10, 0.4), row("prefix", 104, 1, 0.9))
    found = conclusion(compared(100, *methods))
    assert (
        found[2]
        == "Their loss, which tells more, differs from its 0.900 by more than noise: full (0.500) and lora (0.400)."
    )
    assert found[3] == "By loss lora, with 1.00% of the trained parameters, reached 120.0% of full fine-tuning's gain."


def test_one_method_is_compared_with_nothing() -> None:
    assert len(conclusion(compared(100, row("lora", 160, 10, forgetting=0.5)))) == 1


@pytest.mark.parametrize(("gap", "said"), [(0.5, "most: held-out loss +0.500"), (-0.1, "none overfits")])
def test_overfitting(gap: float, said: str) -> None:
    gaps = [{"rows": 32, "train_loss": 1.0, "eval_loss": 1.0 + gap}]
    calm = [{"rows": 32, "train_loss": 1.0, "eval_loss": 0.8}]
    found = conclusion(compared(100, row("full", 160, 1000, gaps=gaps), row("lora", 150, 10, gaps=calm)))
    assert any(said in one for one in found), found
    lost = [{"rows": 32, "train_loss": None, "eval_loss": None}]
    found = conclusion(compared(100, row("full", 160, 1000, gaps=lost), row("lora", 150, 10, gaps=calm)))
    assert not any("overfits" in one for one in found)


def test_padded_methods_are_compared_in_padded_batches() -> None:
    slow = row("prefix", 150, 10, padded=True, training_tokens_per_second=90.0, padded_tokens_per_second=40.0)
    found = conclusion(compared(100, row("full", 160, 1000), slow))
    assert any("full trains fastest in padded batches, 2.0 times as fast as prefix" in one for one in found)


def test_methods_that_failed_are_rows_and_sentences() -> None:
    result = compared(100, row("lora", 160, 10), failed={"full": "memory was short\nmore"})
    assert "full could not be measured: memory was short" in conclusion(result)
    assert "failed: memory was short" in markdown(result) and "failed: memory was short" in page(result)
    alone = compared(100, failed={"full": "memory was short"})
    assert conclusion(alone)[0] == "No method could be measured." and "memory was short" in page(alone)


def test_what_the_numbers_cannot_say() -> None:
    rates = {"rate": 1e-3, "steps": 2, "at_end": True, "runs": [{}, {}], "given_up": [1.0]}
    full, other = row("full", 160, 1000, rates=rates), row("lora", 150, 10, tokens=900)
    result = compared(100, full, other, split="valid")
    result.base["dtype"] = "bfloat16"
    text = "\n".join(notes(result))
    told = (
        "full: 1.0e+00 did best in the short runs, and diverged",
        "full: the best rate was the last",
        "not trained on equally many",
        "no test rows",
        "in bfloat16, where",
    )
    assert all(said in text for said in told)
    plain = "\n".join(notes(compared(100, row("full", 160, 1000), row("lora", 150, 10))))
    assert not any(said in plain for said in told)
