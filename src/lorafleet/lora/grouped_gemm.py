"""Products of unequal sizes in one call, by a function of this package or of oneMKL.

PyTorch has a batched product of equal sizes only; oneMKL, which its CPU builds carry, takes groups of any sizes
(``?gemm_batch``, oneMKL's reference for C, BLAS-like extensions). A loop over products starts each of them by itself
and shares it between all threads: 1.2 to 1.8 times as slow on two cores. ``gemm_batch.c`` takes the same arguments. The
function is looked for and tried; without one there is no grouped product on a CPU.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafleet.lora.compiled import compiled_gemm

Numbers = NDArray[np.int64]

_Real = type[ctypes.c_float] | type[ctypes.c_double]

_REALS: dict[torch.dtype, _Real] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_NAMES = {torch.float32: "sgemm_batch_64", torch.float64: "dgemm_batch_64"}
_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


class Operand(NamedTuple):
    """Matrices of one shape of memory in one tensor.

    Args:
        tensor: Its last two strides are those of each matrix; one of them is 1.
        kind: What tells where they begin; one of the names in ``GroupedGemms``.
        flipped: Whether the matrices are read transposed.
    """

    tensor: Tensor
    kind: str
    flipped: bool = False

    def transposed(self) -> Self:
        """The same matrices, transposed."""
        return self._replace(flipped=not self.flipped)


class Sizes(NamedTuple):
    """Of each C rows and columns, of M columns; from column to column of M, V and C; factors: in Fortran's order."""

    m: Sequence[int]
    n: Sequence[int]
    k: Sequence[int]
    of_m: Sequence[int]
    of_v: Sequence[int]
    of_c: Sequence[int]
    alpha: Sequence[float]


class Gemms:
    """Products ``C = alpha·M·V + beta·C`` in Fortran's order, each of its own size, in one call.

    Args:
        letters: Whether M and V are transposed.
        sizes: Of each product; those of the same sizes in a row are one group of oneMKL's.
        places: Addresses of each product's M, V and C, read at each call.
        beta: 1 adds to C.
        dtype: Of all of them.
    """

    def __init__(
        self, letters: str, sizes: Sizes, places: tuple[Numbers, Numbers, Numbers], beta: float, dtype: torch.dtype
    ) -> None:
        groups = [(*key, len(list(same))) for key, same in groupby(zip(*sizes, strict=True))]
        count = len(groups)
        number, real = ctypes.c_int64 * count, _REALS[dtype] * count
        m, n, k, of_m, of_v, of_c, alphas, same = zip(*groups, strict=True)
        function = _gemm_function(dtype)
        assert function is not None
        of_M, of_V = (letter.encode() * count for letter in letters)
        self.places, self._function = places, function  # held, as the arguments are addresses only
        at_m, at_v, at_c = (addresses.ctypes.data for addresses in places)
        self._arguments = (
            *(of_M, of_V, number(*m), number(*n), number(*k), real(*alphas)),
            *(at_m, number(*of_m), at_v, number(*of_v), real(*[beta] * count), at_c, number(*of_c)),
            *(ctypes.byref(ctypes.c_int64(count)), number(*same)),
        )

    def __call__(self) -> None:
        """Run them."""
        self._function(*self._arguments)


class GroupedGemms:
    """``C_i = alpha·A_i·B_i + beta·C_i`` for many matrices at the same places of one tensor after another.

    What the layers of a model have in common is laid out once, in Python: that takes ten times as long as a call.

    Args:
        counts: Of products side by side that have the same sizes.
        starts: By kind of operand, where each matrix begins in a tensor of these strides, in elements.
    """

    def __init__(self, counts: Numbers, starts: Mapping[str, Callable[[Sequence[int]], Numbers]]) -> None:
        self._counts, self._starts = counts, starts
        self._known: dict[object, tuple[Gemms, list[tuple[Numbers, Numbers]]]] = {}
        self._lock = Lock()  # of the places

    def __call__(
        self, a: Operand, b: Operand, c: Operand, sizes: Sequence[int | Numbers], alpha: float = 1, beta: float = 0
    ) -> None:
        """Run them, in place.

        Args:
            a: The left matrices.
            b: The right ones.
            c: The results; columns lie side by side.
            sizes: Rows of A, columns of B and columns of A, each by ``counts`` or one for all.
            alpha: Factor of the products.
            beta: 1 adds to C, 0 sets it.
        """
        # Fortran's matrices are the transposed ones of C: Cᵀ = Bᵀ·Aᵀ.
        operands = (b, a, c)
        laid = [(one.tensor.stride(), one.tensor.shape, one.kind, one.flipped) for one in operands]
        key = (*laid, *(size if isinstance(size, int) else size.tobytes() for size in sizes), alpha, beta)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._prepared(operands, sizes, alpha, beta)
            gemms, places = self._known[key]
            for one, (starts, addresses) in zip(operands, places, strict=True):
                np.add(starts, one.tensor.data_ptr(), out=addresses)
            gemms()

    def _prepared(
        self, operands: tuple[Operand, ...], sizes: Sequence[int | Numbers], alpha: float, beta: float
    ) -> tuple[Gemms, list[tuple[Numbers, Numbers]]]:
        count = int(self._counts.sum())
        starts = [self._starts[one.kind](one.tensor.stride()) * one.tensor.element_size() for one in operands]
        (letter_m, of_m), (letter_v, of_v), (_, of_c) = map(_layout, operands)
        rows, columns, inner = (
            [size] * count if isinstance(size, int) else np.repeat(size, self._counts).tolist() for size in sizes
        )
        leading = ([of_m] * count, [of_v] * count, [of_c] * count)
        of_each = Sizes(columns, rows, inner, *leading, [alpha] * count)
        first, second, third = (each.copy() for each in starts)
        gemms = Gemms(letter_m + letter_v, of_each, (first, second, third), beta, operands[0].tensor.dtype)
        return gemms, list(zip(starts, gemms.places, strict=True))


def readable(matrices: Tensor) -> Tensor:
    """The tensor itself where its rows or its columns have their numbers side by side, or a copy that does."""
    (row, column), (rows, columns) = matrices.stride()[-2:], matrices.shape[-2:]
    fits = (column == 1 and row >= columns) or (row == 1 and column >= rows)
    return matrices if fits else matrices.contiguous()


def has_grouped_gemm(like: Tensor) -> bool:
    """Whether :class:`GroupedGemms` takes tensors of this type and place."""
    return like.device.type == "cpu" and _works(like.dtype)


def _layout(operand: Operand) -> tuple[str, int]:
    """How Fortran reads a matrix of C's, and how far apart its lines are."""
    (down, across), columns = operand.tensor.stride()[-2:], operand.tensor.shape[-1]
    if operand.flipped:
        down, across, columns = across, down, operand.tensor.shape[-2]
    return ("N", down) if across == 1 and down >= columns else ("T", across)


@cache
def _gemm_function(dtype: torch.dtype) -> Callable[..., None] | None:
    """The function for this type: ours, or oneMKL's; none where PyTorch has been built without it."""
    function: Any = compiled_gemm() if dtype == torch.float32 else None
    if function is None:
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
    kinds: dict[str, Callable[[Sequence[int]], Numbers]] = {
        "a": lambda strides: strides[0] * np.array([0, 3]),
        "b": lambda strides: strides[0] * np.array([0, 1]),
        "c": lambda strides: strides[0] * np.array([0, 2]),
    }
    multiply = GroupedGemms(np.array([1, 1]), kinds)
    multiply(Operand(a, "a"), Operand(b, "b"), Operand(c, "c"), (np.array([2, 4]), 4, 3), alpha=2, beta=1)
    return torch.equal(c, wanted)
