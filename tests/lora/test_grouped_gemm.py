"""Products of unequal sizes in one call, against one product each."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafleet.lora.grouped_gemm import GroupedGemms, Operand, has_grouped_gemm, readable

SIZES = ([2, 5], [4, 3], [3, 6])
COUNTS = [3, 2]


def operand(
    shapes: list[tuple[int, int]], transposed: bool, dtype: torch.dtype, seed: int, margin: int
) -> tuple[Operand, list[Tensor]]:
    """Matrices that lie side by side in one wide tensor, and each by itself."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(8, 8 * len(shapes) + margin, generator=generator, dtype=dtype)
    parts = [wide[:, 8 * i : 8 * i + 8] for i in range(len(shapes))]
    parts = [part.T for part in parts] if transposed else parts
    found = [part[:rows, :columns] for part, (rows, columns) in zip(parts, shapes, strict=True)]
    return Operand(wide, "wide", transposed), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [False, True], ids=["A", "A transposed"])
@pytest.mark.parametrize("right", [False, True], ids=["B", "B transposed"])
@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (0.5, 1)])
def test_equals_one_product_each(dtype: torch.dtype, left: bool, right: bool, alpha: float, beta: float) -> None:
    m, n, k = ([size for size, count in zip(sizes, COUNTS, strict=True) for _ in range(count)] for sizes in SIZES)
    sizes = [np.array(size) for size in SIZES]
    multiply = GroupedGemms(np.array(COUNTS), {"wide": lambda strides: 8 * min(strides) * np.arange(sum(COUNTS))})
    for seed, margin in ((0, 0), (1, 0), (2, 3)):  # other tensors laid out alike, and then otherwise
        a, all_a = operand([*zip(m, k, strict=True)], left, dtype, 3 * seed, margin)
        b, all_b = operand([*zip(k, n, strict=True)], right, dtype, 3 * seed + 1, margin)
        c, all_c = operand([*zip(m, n, strict=True)], False, dtype, 3 * seed + 2, margin)
        wanted = c.tensor.clone()
        taken_off = wanted.clone()
        for i, (one, other, old) in enumerate(zip(all_a, all_b, all_c, strict=True)):
            part = slice(len(old)), slice(8 * i, 8 * i + old.shape[1])
            wanted[part], taken_off[part] = alpha * one @ other + beta * old, beta * old
        multiply(a, b, c, sizes, alpha, beta)
        torch.testing.assert_close(c.tensor, wanted)
        multiply(a, b, c, sizes, -alpha, 1)
        torch.testing.assert_close(c.tensor, taken_off)


def test_it_is_for_full_precision_on_a_cpu() -> None:
    assert has_grouped_gemm(torch.zeros(1)) and has_grouped_gemm(torch.zeros(1, dtype=torch.float64))
    assert not has_grouped_gemm(torch.zeros(1, dtype=torch.bfloat16))
    assert not has_grouped_gemm(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("lies", ["every other column", "one row many times", "one number many times"])
def test_what_cannot_be_read_is_copied(lies: str) -> None:
    plain = torch.arange(24.0).view(4, 6)
    made = {
        "every other column": plain[:, ::2],
        "one row many times": plain[:1].expand(4, 6),
        "one number many times": plain[:1, :1].expand(4, 6),
    }
    found = readable(made[lies])
    assert torch.equal(found, made[lies]) and found.is_contiguous()


def test_rows_and_columns_are_read_as_they_lie() -> None:
    plain = torch.arange(24.0).view(4, 6)
    for tensor in (plain, plain.T, plain[:, :3], plain[:2].T):
        assert readable(tensor).data_ptr() == tensor.data_ptr()
