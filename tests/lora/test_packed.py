"""Packed weights give the products of the plain ones."""

import re
from pathlib import Path

import pytest
import torch

from lorafleet.lora.packed import mapped_files, pack, page_out


def test_products_in_both_directions() -> None:
    weight = torch.randn(24, 16)
    packed = pack(weight)
    assert packed is not None, "this PyTorch has no oneDNN operators to pack with; lorafleet works, but slower"
    x, grad, bias = torch.randn(9, 16), torch.randn(9, 24), torch.randn(24)
    torch.testing.assert_close(packed.linear(x, bias), x @ weight.T + bias)
    torch.testing.assert_close(packed.input_gradient(grad), grad @ weight)
    before = x.clone()
    torch.testing.assert_close(packed.input_gradient(grad, x), x + grad @ weight)
    assert torch.equal(x, before)


def test_other_precisions_and_trainable_weights_are_not_packed() -> None:
    assert pack(torch.randn(4, 4, dtype=torch.float64)) is None
    assert pack(torch.randn(4, 4, requires_grad=True)) is None


def test_a_weight_mapped_from_a_file_leaves_memory_and_keeps_its_bytes(tmp_path: Path) -> None:
    count = 8 << 20  # 32 MiB
    path = tmp_path / "weights"
    torch.arange(count, dtype=torch.float32).numpy().tofile(path)
    weight = torch.from_file(str(path), shared=False, size=count)
    weight[7] = -1  # a page that was changed has no other copy than this one
    total = weight.sum()
    before = _file_bytes()
    page_out(weight, mapped_files())
    if before is not None:
        assert before - (_file_bytes() or 0) > 16 << 20
    assert torch.equal(weight.sum(), total)
    assert weight[7] == -1


def test_memory_that_no_file_backs_is_left_alone() -> None:
    weight = torch.ones(8 << 20)
    page_out(weight, mapped_files())
    assert torch.equal(weight, torch.ones(8 << 20))


def _file_bytes() -> int | None:
    """Memory of this process that files back, where the system tells."""
    status = Path("/proc/self/status")
    found = re.search(r"RssFile:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("shape", [(576, 1536), (192, 576), (2048, 4096)])
def test_a_row_gives_the_same_alone_and_among_others(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=random), torch.randn(130, shape[1], generator=random)
    packed = pack(weight)
    assert packed is not None
    alone = torch.cat([packed.linear(row[None], None) for row in x])
    for rows in (2, 3, 8, 65, 130):
        assert torch.equal(packed.linear(x[:rows], None), alone[:rows])
