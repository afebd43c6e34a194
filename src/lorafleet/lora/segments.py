"""The segments of a flat batch, and products in which each segment's rows meet its own slot's matrices."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.lora.grouped_gemm import GroupedGemms, Numbers, Operand, has_grouped_gemm, readable
from lorafleet.lora.packed import PackedWeight


class LoraSegment(NamedTuple):
    """What one layer does with rows ``start:stop``: its slot, that slot's rank, scale and dropout, and its bias.

    Of the rows of A and Bᵀ, the last ``frozen`` ones are constants: their gradients are zero.
    """

    slot: int
    start: int
    stop: int
    rank: int
    scaling: float
    dropout: float = 0.0
    mask_seed: int = 0
    trains_bias: bool = False
    frozen: int = 0


class LinearTensors(NamedTuple):
    """One layer of a joint product: its frozen weight, all slots' A and B, and what it does with each segment.

    Args:
        weight: Frozen base weight ``(out, in)``.
        bias: Base bias ``(out,)``, or none.
        lora_A: All slots' A ``(K, r_max, in)``; rows past a slot's rank are zero.
        lora_B: All slots' Bᵀ ``(K, r_max, out)``; rows past a slot's rank are zero.
        lora_bias: All slots' trained change of the bias ``(K, out)``, or none.
        segments: Disjoint and in order; rows that none covers get the base alone.
        packed: The frozen weight in a faster layout, if it has one.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    segments: Sequence[LoraSegment]
    packed: PackedWeight | None = None


def dropout_mask(seed: int, shape: tuple[int, int], p: float, like: Tensor) -> Tensor:
    """A mask of zeros and ``1/(1-p)`` that follows from ``seed`` alone, so that the backward pass draws it again."""
    generator = None if like.is_meta else torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.empty(shape, dtype=like.dtype, device=like.device)
    return keep.bernoulli_(1 - p, generator=generator).div_(1 - p)


def joined_mask(segments: Sequence[LoraSegment], like: Tensor) -> Tensor | None:
    """The dropout of all rows of ``like (tokens, in)``, or none where no segment has any."""
    if not any(s.dropout for s in segments):
        return None
    mask = torch.ones_like(like)
    for s in segments:
        if s.dropout:
            mask[s.start : s.stop] = dropout_mask(s.mask_seed, (s.stop - s.start, like.shape[1]), s.dropout, like)
    return mask


class _Longest(NamedTuple):
    """Segments, the longest first: so no thread is left with a long product when the others are done.

    Args:
        lengths: Rows of each.
        multiply: ``C_k = A_k·B_k + beta·C_k`` for each.
    """

    lengths: Numbers
    multiply: GroupedGemms

    @staticmethod
    def rows(x: Tensor) -> Operand:
        """Each segment's rows of ``x (tokens, n)``."""
        return Operand(x, "rows")

    @staticmethod
    def own(matrices: Tensor) -> Operand:
        """Each segment's matrix of ``(segments, n, m)``."""
        return Operand(matrices, "own")


def _longest(starts: Numbers, lengths: Numbers) -> _Longest:
    numbers = np.argsort(-lengths, kind="stable")
    firsts = starts[numbers]
    kinds = {"rows": lambda strides: strides[0] * firsts, "own": lambda strides: strides[0] * numbers}
    return _Longest(lengths[numbers], GroupedGemms(np.ones_like(numbers), kinds))


class RowGroups(NamedTuple):
    """Products in which each segment's rows of a ``(tokens, features)`` tensor meet a matrix of their own.

    Equal segments that fill the batch are one batched product. Others are a grouped product where there is one, or one
    product each, of their own length.

    Args:
        lengths: Rows between segments and rows of segments, in turn; between segments there may be none.
        even: Whether the segments are equally long and fill the batch.
        ends: Where each segment ends, ``(segments,)``, for a GPU's grouped products; none without them.
        longest: The segments for a CPU's grouped products; none without them.
    """

    lengths: list[int]
    even: bool
    ends: Tensor | None = None
    longest: _Longest | None = None

    def _entries(self, tensor: Tensor) -> Tensor:
        return tensor.view(len(self.lengths) // 2, -1, tensor.shape[1])

    def _parts(self, tensor: Tensor) -> Sequence[Tensor]:
        return torch.split(tensor, self.lengths)[1::2]

    def product(self, x: Tensor, matrices: Tensor) -> Tensor:
        """``x_k·M_k`` as ``(tokens, m)``, for ``matrices (segments, n, m)``; zeros in rows of no segment."""
        if self.even:
            return torch.bmm(self._entries(x), matrices).flatten(0, 1)
        if self.ends is not None:
            return F.grouped_mm(x, matrices, offs=self.ends)
        if (each := self.longest) is not None:
            # A narrow result is faster made, and faster read, with its columns side by side in memory.
            out, (_, n, m) = x.new_zeros(matrices.shape[2], x.shape[0]), matrices.shape
            sums = each.rows(out.T).transposed()
            each.multiply(each.own(matrices.mT), each.rows(readable(x)).transposed(), sums, (m, each.lengths, n))
            return out.T
        out = x.new_zeros(x.shape[0], matrices.shape[2])
        for part, matrix, into in zip(self._parts(x), matrices.unbind(), self._parts(out), strict=True):
            torch.mm(part, matrix, out=into)
        return out

    def add_product(self, into: Tensor, x: Tensor, matrices: Tensor) -> None:
        """``x_k·M_k`` added to ``into (tokens, m)``, for ``matrices (segments, n, m)``."""
        if self.even:
            self._entries(into).baddbmm_(self._entries(x), matrices)
            return
        if self.ends is not None:
            into += F.grouped_mm(x, matrices, offs=self.ends)
            return
        if (each := self.longest) is not None:
            _, n, m = matrices.shape
            each.multiply(each.rows(readable(x)), each.own(matrices), each.rows(into), (each.lengths, m, n), beta=1)
            return
        for part, matrix, onto in zip(self._parts(x), matrices.unbind(), self._parts(into), strict=True):
            onto.addmm_(part, matrix)

    def outer_product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a_kᵀ·b_k`` as ``(segments, n, m)``, for ``a (tokens, n)`` and ``b (tokens, m)``."""
        if self.even:
            return torch.bmm(self._entries(a).mT, self._entries(b))
        if self.ends is not None:
            return F.grouped_mm(a.T, b, offs=self.ends)
        out = a.new_empty(len(self.lengths) // 2, a.shape[1], b.shape[1])
        if (each := self.longest) is not None:
            _, n, m = out.shape
            rows_a, rows_b = each.rows(readable(a)).transposed(), each.rows(readable(b))
            each.multiply(rows_a, rows_b, each.own(out), (n, m, each.lengths))
            return out
        for left, right, into in zip(self._parts(a), self._parts(b), out.unbind(), strict=True):
            torch.mm(left.T, right, out=into)
        return out

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Results of ``product`` side by side, ``(tokens, m_1 + m_2 + …)``, in memory as each of them."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([*parts], dim=1) if self.longest is None else torch.cat([part.T for part in parts]).T


def row_groups(segments: Sequence[tuple[int, int]], x: Tensor, sizes: Sequence[int]) -> RowGroups:
    """The rows from start to stop of segments in ``x (tokens, …)``, for products with matrices of these ``sizes``."""
    lengths, end = list[int](), 0
    for start, stop in segments:
        lengths += [start - end, stop - start]
        end = stop
    lengths.append(len(x) - end)
    full = not any(lengths[::2])
    if len(segments) > 1 and full and len(set(lengths[1::2])) == 1:
        return RowGroups(lengths, even=True)
    # PyTorch's grouped product takes bfloat16 whose rows begin at multiples of 16 bytes. On a CPU it gains nothing.
    grouped = x.is_cuda and x.dtype == torch.bfloat16 and full and not any(size % 8 for size in sizes)
    ends = torch.tensor([stop for _, stop in segments], dtype=torch.int32, device=x.device) if grouped else None
    longest = None
    if len(segments) > 1 and has_grouped_gemm(x):
        longest = _longest(np.array([start for start, _ in segments]), np.array(lengths[1::2]))
    return RowGroups(lengths, even=False, ends=ends, longest=longest)
