"""Products of unequal sizes in one call of oneMKL, through PyTorch's own library.

PyTorch has a batched product of equal sizes only; oneMKL, which its CPU builds carry, takes groups of any sizes
(``?gemm_batch``, oneMKL's reference for C, BLAS-like extensions). A loop over products starts each of them by itself
and shares it between all threads: 1.2 to 1.8 times as slow on two cores. The function is looked for and tried; without
it there is no grouped product on a CPU.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64]

_Real = type[ctypes.c_float] | type[ctypes.c_double]

_REALS: dict[torch.dtype, _Real] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_NAMES = {torch.float32: "sgemm_batch_64", torch.float64: "dgemm_batch_64"}
_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


class Operand(NamedTuple):
    """Matrices of one shape of memory in one tensor.

    Args:
        view: Shows the strides of each in its last two dimensions; one of them is 1.
        starts: Where each matrix begins in it, in elements.
    """

    view: Tensor
    starts: Numbers

    def transposed(self) -> Self:
        """The same matrices, transposed."""
        return self._replace(view=self.view.mT)


def grouped_gemm(
    a: Operand,
    b: Operand,
    c: Operand,
    sizes: Sequence[int | Numbers],
    counts: Numbers,
    alpha: float = 1,
    beta: float = 0,
) -> None:
    """``C_i = alpha·A_i·B_i + beta·C_i`` for many matrices, in place.

    Args:
        a: The left matrices.
        b: The right ones.
        c: The results; columns lie side by side.
        sizes: Rows of A, columns of B and columns of A, each by group of products of the same sizes or one for all.
        counts: How many products are in each group.
        alpha: Factor of the products.
        beta: 1 adds to C, 0 sets it.
    """
    groups, real = len(counts), _REALS[a.view.dtype]
    # Fortran's matrices are the transposed ones of C: Cᵀ = Bᵀ·Aᵀ.
    (b_letter, b_leading), (a_letter, a_leading) = _layout(b.view), _layout(a.view)
    m, n, k = (_by_group(size, groups) for size in sizes)
    arrays = [
        *(n, m, k, np.full(groups, alpha, real)),
        *(_addresses(b), _by_group(b_leading, groups)),
        *(_addresses(a), _by_group(a_leading, groups)),
        np.full(groups, beta, real),
        *(_addresses(c), _by_group(c.view.stride(-2), groups)),
        np.array([groups]),
        counts,
    ]
    function = _gemm_function(a.view.dtype)
    assert function is not None
    function(b_letter * groups, a_letter * groups, *(array.ctypes.data for array in arrays))


def _by_group(size: int | Numbers, groups: int) -> Numbers:
    return np.full(groups, size) if isinstance(size, int) else size


def _addresses(operand: Operand) -> Numbers:
    return operand.view.data_ptr() + operand.view.element_size() * operand.starts


def readable(matrices: Tensor) -> Tensor:
    """The tensor itself where its rows or its columns have their numbers side by side, or a copy that does."""
    (row, column), (rows, columns) = matrices.stride()[-2:], matrices.shape[-2:]
    fits = (column == 1 and row >= columns) or (row == 1 and column >= rows)
    return matrices if fits else matrices.contiguous()


class Sizes(NamedTuple):
    """Rows and columns of each C, columns of M, from column to column of C, and factors: in Fortran's order."""

    m: list[int]
    n: list[int]
    k: list[int]
    leading: list[int]
    alpha: list[float]


class Gemms:
    """Products ``C = alpha·M·V + beta·C`` in Fortran's order, each of its own size.

    Args:
        letter: Whether M is transposed.
        sizes: Of each product; those of the same sizes in a row are one group of oneMKL's.
        places: Addresses of each product's M, V and C, read at each call.
        beta: 1 adds to C.
        dtype: Of all of them.
    """

    def __init__(
        self, letter: bytes, sizes: Sizes, places: tuple[Numbers, Numbers, Numbers], beta: float, dtype: torch.dtype
    ) -> None:
        groups = [(key, len(list(same))) for key, same in groupby(zip(*sizes, strict=True))]
        count = len(groups)
        number, real = ctypes.c_int64 * count, _REALS[dtype] * count
        m, n, k, leading = (number(*(int(key[i]) for key, _ in groups)) for i in range(4))
        function = _gemm_function(dtype)
        assert function is not None
        self._function, self._places = function, places  # held, as the arguments are addresses only
        of_m, of_v, of_c = (addresses.ctypes.data for addresses in places)
        self._arguments = (
            *(letter * count, b"N" * count, m, n, k, real(*(key[4] for key, _ in groups))),
            *(of_m, k if letter == b"T" else m, of_v, k, real(*[beta] * count), of_c, leading),
            *(ctypes.byref(ctypes.c_int64(count)), number(*(same for _, same in groups))),
        )

    def __call__(self) -> None:
        """Run them."""
        self._function(*self._arguments)


def has_grouped_gemm(like: Tensor) -> bool:
    """Whether :func:`grouped_gemm` takes tensors of this type and place."""
    return like.device.type == "cpu" and _works(like.dtype)


def _layout(matrix: Tensor) -> tuple[bytes, int]:
    """How Fortran reads a matrix of C's, and how far apart its lines are."""
    down, across = matrix.stride()[-2:]
    return (b"N", down) if across == 1 and down >= matrix.shape[-1] else (b"T", across)


@cache
def _gemm_function(dtype: torch.dtype) -> Callable[..., None] | None:
    """OneMKL's function for this type; none where PyTorch has been built without it."""
    try:
        function = getattr(ctypes.CDLL(str(_LIBRARY)), _NAMES[dtype])
    except (OSError, AttributeError, KeyError):
        return None
    function.argtypes, function.restype = [ctypes.c_char_p] * 2 + [ctypes.c_void_p] * 13, None
    return cast(Callable[..., None], function)


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether the function is there and its answer is the product; found out once."""
    if _gemm_function(dtype) is None:
        return False
    a, b, c = (torch.arange(24, dtype=dtype).view(shape) for shape in ((8, 3), (2, 3, 4), (6, 4)))
    wanted = torch.cat([2 * a[:2] @ b[0], 2 * a[3:7] @ b[1]]) + c
    left, right, sums = (Operand(tensor, np.array([0, second])) for tensor, second in ((a, 9), (b, 12), (c, 8)))
    grouped_gemm(left, right, sums, (np.array([2, 4]), 4, 3), np.array([1, 1]), alpha=2, beta=1)
    return torch.equal(c, wanted)
