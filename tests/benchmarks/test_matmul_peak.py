from collections import Counter

import pytest
import torch

from benchmarks.matmul_peak import (
    BatchShape,
    LinearShape,
    ModelShape,
    Product,
    best_kernel,
    kernels,
    measure_need,
    step_products,
)

BATCH = BatchShape(lengths=(3, 5, 5), targets=4)


def tiny_shape() -> ModelShape:
    return ModelShape(
        linears=(LinearShape(16, 8, 2, False), LinearShape(16, 8, 2, True), LinearShape(8, 16, 2, True)),
        hidden=16,
        vocabulary=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
    )


def operations(products: Counter[Product], group: str) -> int:
    """Multiplications of a group."""
    return sum(count * max(1, p.batch) * p.m * p.k * p.n for p, count in products.items() if p.group == group)


def test_a_step_needs_these_products_and_no_others() -> None:
    found = step_products(tiny_shape(), BATCH)
    tokens = 13
    assert operations(found, "forward") == tokens * 3 * 16 * 8
    # The first layer reads the embeddings, which do not train.
    assert operations(found, "gradient") == tokens * 2 * 16 * 8
    # r-wide: h, dA on the input's side, y, dh, dB on the output's, and dx where it is needed.
    assert operations(found, "lora") == tokens * 2 * ((2 * 16 + 3 * 8) + (3 * 16 + 3 * 8) + (3 * 8 + 3 * 16))
    assert operations(found, "head") == 2 * 4 * 16 * 32
    scores = sum(length**2 for length in BATCH.lengths) * 4 * 4
    assert operations(found, "attention") == 2 * 6 * scores


def test_a_common_beginning_computed_once_saves_linear_products_alone() -> None:
    once, whole = (step_products(tiny_shape(), BatchShape(BATCH.lengths, 4, prompt)) for prompt in (2, 0))
    for group in ("forward", "gradient", "lora"):
        assert operations(once, group) * 13 == operations(whole, group) * 9
    for group in ("head", "attention"):
        assert operations(once, group) == operations(whole, group)


@pytest.mark.parametrize(
    "product",
    [
        Product("forward", 6, 5, 4),
        Product("lora", 6, 5, 2, free="by"),
        Product("lora", 6, 2, 5, free="ab", adds=True),
        Product("attention", 6, 5, 4, free="aby", batch=3),
    ],
)
def test_every_kernel_gives_the_result_a_loop_wants(product: Product) -> None:
    names = []
    for name, make in kernels(product):
        result = make()()
        assert isinstance(result, torch.Tensor)
        assert result.shape == ((product.batch,) if product.batch else ()) + (product.m, product.n)
        assert torch.isfinite(result).all()
        names.append(name)
    assert len(names) == len(set(names))
    assert len(names) >= 2 ** len(product.free)
    assert ("F.linear" in names) == (product.free == "b")
    seconds, best = best_kernel(product, seconds=0)
    assert seconds > 0
    assert best in names


def test_the_need_grows_with_how_often_a_product_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.matmul_peak.best_kernel", lambda product: (1.0, "mm"))
    need = measure_need(tiny_shape(), [BATCH, BATCH])
    assert need.tokens == 26
    assert need.seconds["forward"] == 2 * 3
    assert need.seconds["gradient"] == 2 * 2
    assert need.seconds["head"] == 2 * 2
    assert need.seconds["attention"] == 2 * 2 * 2 * 6  # steps, layers, distinct lengths, products
