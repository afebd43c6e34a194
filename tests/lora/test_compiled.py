"""Our own grouped product: compiled once, kept, refused where it is not to be trusted, and the same to the bit."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafleet.lora import compiled, grouped_gemm
from lorafleet.lora.grouped_gemm import GroupedGemms, Operand


def require() -> None:
    if compiled.compiled_gemm() is None:
        pytest.skip("this machine has no GCC, or no AVX2")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that has not asked for the function yet."""
    require()
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "compiled_gemm", compiled.compiled_gemm.__wrapped__)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the compiled file."""
    require()
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFLEET_CACHE", str(folder))
        assert compiled.compiled_gemm.__wrapped__() is not None
    return folder


@pytest.fixture
def library(cache: Path, made: Path) -> Path:
    """The compiled file, in the test's own cache folder."""
    shutil.copytree(made, cache)
    (path,) = cache.iterdir()
    return path


def fake_gcc(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "gcc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "gcc").chmod(0o700)
    monkeypatch.setenv("PATH", str(folder))


def test_it_is_compiled_once_and_kept(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    monkeypatch.setattr(compiled.subprocess, "run", None)  # nothing to call
    assert compiled.compiled_gemm() is not None


WRITES = 'while [ "$1" != -o ]; do shift; done; echo >"$2"'


@pytest.mark.parametrize(
    "script", [f"{WRITES}; echo no such flag >&2; exit 1", WRITES], ids=["fails", "writes no library"]
)
def test_a_compiler_that_fails_leaves_it_to_the_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    fake_gcc(tmp_path / "bin", monkeypatch, script)
    assert compiled.compiled_gemm() is None
    assert "gemm_batch.c cannot be compiled" in caplog.text
    assert ("no such flag" in caplog.text) == ("no such flag" in script)
    assert not [path for path in cache.iterdir() if path.suffix == ".tmp"]


def test_without_a_compiler_nothing_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert compiled.compiled_gemm() is None
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_leaves_it_to_the_library(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("not a folder")
    assert compiled.compiled_gemm() is None
    assert "gemm_batch.c cannot be compiled" in caplog.text


def test_what_others_can_write_to_is_not_run(library: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.chmod(0o777)
    assert compiled.compiled_gemm() is None
    assert f"{library} can be changed by others" in caplog.text


def test_what_belongs_to_somebody_else_is_not_run(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert compiled.compiled_gemm() is None
    assert len([*library.parent.iterdir()]) == 2  # compiled anew, not taken over


def test_a_second_pool_of_threads_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = iter([{"libgomp-of-pytorch.so"}, {"libgomp-of-pytorch.so", "libgomp.so.1"}])
    monkeypatch.setattr(compiled, "_thread_pools", lambda: next(pools))
    assert compiled.compiled_gemm() is None


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("across", [False, True], ids=["R by rows", "R by columns"])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (8, 48), (53, 64), (100, 53), (205, 10), (576, 24)])
def test_what_a_row_gives_does_not_depend_on_the_others(across: bool, k: int, m: int) -> None:
    require()
    random = torch.Generator().manual_seed(0)
    x, right = torch.randn(40, k, generator=random), torch.randn(k, m, generator=random)
    right = right.T.contiguous().T if across else right
    alone = torch.stack([_products(x[row : row + 1], right, [1])[0] for row in range(len(x))])
    torch.testing.assert_close(alone, x @ right, rtol=1e-4, atol=1e-4)
    for sizes in ([40], [1, 39], [3, 4, 5, 6, 7, 15], [8, 32], [2] * 20):
        assert torch.equal(_products(x, right, sizes), alone)


def _products(x: torch.Tensor, right: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Groups of rows of ``x`` times ``right``, each group a product of its own."""
    starts = np.array([0, *np.cumsum(sizes)[:-1]])
    kinds = {"rows": lambda strides: strides[0] * starts, "same": lambda strides: 0 * starts}
    out = torch.empty(len(x), right.shape[1])
    multiply = GroupedGemms(np.ones(len(sizes), dtype=np.int64), kinds)
    lengths = np.array(sizes)
    multiply(Operand(x, "rows"), Operand(right, "same"), Operand(out, "rows"), (lengths, right.shape[1], x.shape[1]))
    return out


def test_it_is_what_small_products_are_made_by() -> None:
    require()
    own = compiled.compiled_gemm()
    assert grouped_gemm._gemm_function(torch.float32) is own
    assert grouped_gemm._gemm_function(torch.float64) is not own
