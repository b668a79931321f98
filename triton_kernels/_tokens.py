"""What the kernels of token_score share: tiles of pairs, their hidden rows, launch choice.

The pairs of the packed batch are numbered ``word * C + label``. A tile is BLOCK_M of them, whatever
the sequences they come from: a row of a product never sees another row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels._common import Chip, cast, dot, wide
from fastenc.triton_kernels._spans import span_keep

TOKEN_TAG = tl.constexpr(2)  # fourth counter word of the dropout mask, as ops/_token_ref.py has it


@dataclass(frozen=True)
class Launch:
    """``block_m`` pairs, ``block_r`` hidden columns, ``block_d`` factors."""

    block_m: int
    block_r: int
    block_d: int
    num_warps: int
    num_stages: int = 2

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_R": self.block_r, "BLOCK_D": self.block_d,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


Launches = tuple[Launch, ...]


def pair_launches(dtype: torch.dtype, chip: Chip) -> Launches:
    """Launches of every product of token_score, the default first."""
    if chip.backend == "cpu":
        return (Launch(32, 32, 16, 4),)
    if dtype == torch.float32:
        return (Launch(32, 64, 32, 4),)
    return (Launch(64, 64, 64, 4),)


def sequence_of(words: int, cu_words: Tensor) -> Tensor:
    """(words,) int32: the sequence of every packed word, without reading the device."""
    index = torch.arange(words, dtype=cu_words.dtype, device=cu_words.device)
    return torch.searchsorted(cu_words[1:], index, right=True, out_int32=True)


# ---- device functions --------------------------------------------------------------------------


@triton.jit
def tile_pairs(seq_ptr, first, last, num_labels, BLOCK_M: tl.constexpr):
    """(word, label, sequence, whether it is one of [first, last)) of BLOCK_M pairs from ``first``
    on; pairs past the last are the last."""
    place = first + tl.arange(0, BLOCK_M)
    exists = place < last
    pair = tl.minimum(place, last - 1)
    word = (pair // num_labels).to(tl.int32)
    label = (pair - wide(word) * num_labels).to(tl.int32)
    return word, label, tl.load(seq_ptr + word), exists


@triton.jit
def factor_tile(s_rows, t_rows, exists, k, factors, DTYPE: tl.constexpr):
    """``token_factor * label_factor`` in the columns ``k``: (pairs, columns)."""
    mask = exists[:, None] & (k < factors)[None, :]
    s = tl.load(s_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
    return cast(s * tl.load(t_rows + k[None, :], mask=mask, other=0.0).to(tl.float32), DTYPE)


@triton.jit
def hidden_tile(
    token_ptr, label_ptr, s_rows, t_rows, weight_ptr, seed_ptr, threshold, word, label, seq, exists,
    column, size, factors, token_stride, label_stride_n, label_stride_c, weight_stride,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Hidden rows of a tile in BLOCK_R columns from ``column`` on, fp32, rectified; what dropout
    keeps is not scaled yet. Columns past ``size`` are zeros."""
    dtype: tl.constexpr = token_ptr.dtype.element_ty
    col = column + tl.arange(0, BLOCK_R)
    inside = col < size
    weight_rows = weight_ptr + wide(col)[:, None] * weight_stride
    rows = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for base in range(0, factors, BLOCK_D):
        k = base + tl.arange(0, BLOCK_D)
        x = factor_tile(s_rows, t_rows, exists, k, factors, dtype)
        w = tl.load(
            weight_rows + k[None, :], mask=inside[:, None] & (k < factors)[None, :], other=0.0
        )
        rows = dot(x, tl.trans(w), rows, PRECISION)
    tokens = token_ptr + wide(word)[:, None] * token_stride
    labels = label_ptr + (wide(seq) * label_stride_n + wide(label) * label_stride_c)[:, None]
    rows += tl.load(tokens + col[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    rows += tl.load(labels + col[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    rows = tl.where(rows > 0, rows, tl.where(rows == rows, 0.0, rows))
    if DROPOUT:
        keep = span_keep(
            seed_ptr, threshold, word, label, column, BLOCK_M, BLOCK_R, TOKEN_TAG
        )  # fmt: skip
        rows = tl.where(keep, rows, 0.0)
    return rows
