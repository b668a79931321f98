"""What the attention kernels share: heads as column pieces, masks, dropout, bias, the tile list.

A head is a tuple of column pieces, each (offset, width, valid): widths are powers of two that
cover the head without padding where they can (64 -> 64, 96 -> 64 + 32), and each half of it where
q and k are rotated (64 -> 32 + 32), so that the rotation is elementwise between two pieces.
Rows are offsets from a 64-bit row pointer, so 32 bits are enough inside a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import LOG2_E, cast, dot
from fastenc.triton_kernels.rope import turn

MAX_HEAD_DIM = 256


def pieces_of(head_dim: int, halves: bool = False) -> tuple[tuple[int, int, int], ...]:
    """The column pieces of a head; with ``halves`` each half on its own, in the same widths."""
    span = head_dim // 2 if halves else head_dim
    pieces, offset = [], 0
    while offset < span:
        left = span - offset
        width = max(1 << (left.bit_length() - 1), 16)
        pieces.append((offset, width, min(width, left)))
        offset += width
    if len(pieces) > 2:  # more dots cost more than the padding they avoid
        pieces = [(0, _common.power_of_2(span), span)]
    if halves:
        pieces += [(span + offset, width, valid) for offset, width, valid in pieces]
    return tuple(pieces)


# ---- pieces ------------------------------------------------------------------------------------


@triton.jit
def _load_piece(ptr, rows, stride, OFFSET: tl.constexpr, WIDTH: tl.constexpr, VALID: tl.constexpr):
    col = tl.arange(0, WIDTH)[None, :]
    ptrs = ptr + rows[:, None] * stride + (OFFSET + col)
    return tl.load(ptrs) if VALID == WIDTH else tl.load(ptrs, mask=col < VALID, other=0.0)


@triton.jit
def _store_piece(
    ptr, rows, stride, x, mask, OFFSET: tl.constexpr, WIDTH: tl.constexpr, VALID: tl.constexpr
):
    col = tl.arange(0, WIDTH)[None, :]
    ptrs = ptr + rows[:, None] * stride + (OFFSET + col)
    mask = mask[:, None]
    if VALID != WIDTH:
        mask = mask & (col < VALID)
    tl.store(ptrs, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_head(ptr, rows, stride, PIECES: tl.constexpr):
    """The pieces of a head at ``rows``, each (rows, width)."""
    head = ()
    for i in tl.static_range(len(PIECES)):
        head += (_load_piece(ptr, rows, stride, PIECES[i][0], PIECES[i][1], PIECES[i][2]),)
    return head


@triton.jit
def store_head(ptr, rows, stride, head, mask, PIECES: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        _store_piece(
            ptr, rows, stride, head[i], mask, PIECES[i][0], PIECES[i][1], PIECES[i][2]
        )  # fmt: skip


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_head(ROWS: tl.constexpr, PIECES: tl.constexpr):
    head = ()
    for i in tl.static_range(len(PIECES)):
        head += (_zeros(ROWS, PIECES[i][1]),)
    return head


@triton.jit
def scale_head(head, factor, PIECES: tl.constexpr):
    scaled = ()
    for i in tl.static_range(len(PIECES)):
        scaled += (head[i] * factor,)
    return scaled


@triton.jit
def rotate_head(
    head, pos, cos_ptr, sin_ptr, cos_stride, sin_stride, PIECES: tl.constexpr,
    INVERSE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The rotation of a head in halves by its positions; the result is rounded to DTYPE."""
    HALF: tl.constexpr = len(PIECES) // 2
    first = ()
    second = ()
    for i in tl.static_range(HALF):
        cos = _load_piece(cos_ptr, pos, cos_stride, PIECES[i][0], PIECES[i][1], PIECES[i][2])
        sin = _load_piece(sin_ptr, pos, sin_stride, PIECES[i][0], PIECES[i][1], PIECES[i][2])
        sin = sin.to(tl.float32)
        if INVERSE:
            sin = -sin
        a, b = turn(head[i].to(tl.float32), head[i + HALF].to(tl.float32), cos.to(tl.float32), sin)
        first += (cast(a, DTYPE),)
        second += (cast(b, DTYPE),)
    return first + second


@triton.jit
def dot_heads(
    a, b, ROWS: tl.constexpr, COLS: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):
    """``a b^T`` of two heads of N pieces: (ROWS, COLS), fp32."""
    product = tl.zeros((ROWS, COLS), tl.float32)
    for i in tl.static_range(N):
        product = dot(a[i], tl.trans(b[i]), product, PRECISION)
    return product


@triton.jit
def accumulate(accumulator, p, head, N: tl.constexpr, PRECISION: tl.constexpr):
    """``accumulator + p head``, piece by piece."""
    result = ()
    for i in tl.static_range(N):
        result += (dot(p, head[i], accumulator[i], PRECISION),)
    return result


# ---- dropout and bias --------------------------------------------------------------------------


@triton.jit
def keep_mask(
    seed_ptr, threshold, row, key, head, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What dropout keeps of rows ``row`` (packed indices) and KEYS keys from ``key`` (of the
    sequence, a multiple of 4) on: (ROWS, KEYS), or (KEYS, ROWS) if TRANSPOSED.

    Philox 4x32-10 as :mod:`fastenc.ops._philox` defines it: one counter serves four keys.
    """
    seed = tl.load(seed_ptr)
    key_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    group = (key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)
    row = row.to(tl.uint32)
    if TRANSPOSED:
        zero = tl.zeros((KEYS // 4, ROWS), tl.uint32)
        counter, row = group[:, None] + zero, row[None, :] + zero
    else:
        zero = tl.zeros((ROWS, KEYS // 4), tl.uint32)
        counter, row = group[None, :] + zero, row[:, None] + zero
    head = zero + head.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(counter, row, head, zero, key_low, key_high)
    limit = threshold.to(tl.uint32)
    kept = (w0 >= limit).to(tl.int32) | ((w1 >= limit).to(tl.int32) << 1)
    kept = kept | ((w2 >= limit).to(tl.int32) << 2) | ((w3 >= limit).to(tl.int32) << 3)
    word = tl.arange(0, 4)
    if TRANSPOSED:
        kept = tl.reshape((kept[:, None, :] >> word[None, :, None]) & 1, (KEYS, ROWS))
    else:
        kept = tl.reshape((kept[:, :, None] >> word[None, None, :]) & 1, (ROWS, KEYS))
    return kept != 0


@triton.jit
def bias_of(bias_ptr, distance, radius, stride):
    """The bias at ``distance`` = key - query, in base 2. ``bias_ptr``: the head's row."""
    bucket = tl.minimum(tl.maximum(distance, -radius), radius) + radius
    return tl.load(bias_ptr + bucket * stride).to(tl.float32) * LOG2_E


@triton.jit
def in_window(i, j, length, left, right):
    """Whether key ``j`` is in the sequence and in the window of query ``i``, one comparison each.

    ``i`` and ``j`` broadcast; at most one of ``left`` and ``right`` is unlimited (1 << 30).
    """
    j = tl.where(j < length, j + left, left - 2147483647)
    return (j - i).to(tl.uint32) <= (left + right).to(tl.uint32)


# ---- the tile list -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_seqs", "slots"])
def _schedule_kernel(
    cu_ptr, tiles_ptr, num_seqs, slots, BLOCK: tl.constexpr, SEQS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Write each sequence's tiles at its place in the order, longest first, ties by index.

    A sequence's place is the number of tiles of the sequences before it in that order: each
    program counts them for SEQS sequences against all, then writes; the rest is marked empty.
    """
    seq = tl.program_id(0) * SEQS + tl.arange(0, SEQS)
    start = tl.load(cu_ptr + seq, mask=seq < num_seqs, other=0)
    length = tl.load(cu_ptr + seq + 1, mask=seq < num_seqs, other=0) - start
    place = tl.zeros((SEQS,), tl.int32)
    used = 0
    for base in range(0, num_seqs, SEQS):
        other = base + tl.arange(0, SEQS)
        begin = tl.load(cu_ptr + other, mask=other < num_seqs, other=0)
        size = tl.load(cu_ptr + other + 1, mask=other < num_seqs, other=0) - begin
        tiles = tl.where(other < num_seqs, tl.cdiv(size, BLOCK), 0)
        longer = (size[None, :] > length[:, None]) | (
            (size[None, :] == length[:, None]) & (other[None, :] < seq[:, None])
        )
        place += tl.sum(tl.where(longer, tiles[None, :], 0), axis=1)
        used += tl.sum(tiles)
    tiles = tl.where(seq < num_seqs, tl.cdiv(length, BLOCK), 0)
    for base in range(0, tl.max(tiles), STEP):
        tile = base + tl.arange(0, STEP)[None, :]
        ptrs = tiles_ptr + place[:, None] + tile
        mine = tile < tiles[:, None]
        tl.store(ptrs, start[:, None] + tl.zeros_like(tile), mask=mine)
        tl.store(ptrs + slots, length[:, None] + tl.zeros_like(tile), mask=mine)
        tl.store(ptrs + 2 * slots, tile * BLOCK + tl.zeros_like(tiles)[:, None], mask=mine)
    step = tl.num_programs(0) * SEQS
    for base in range(used + tl.program_id(0) * SEQS, slots, step):
        slot = base + tl.arange(0, SEQS)
        tl.store(tiles_ptr + slot, 0, mask=slot < slots)
        tl.store(tiles_ptr + slots + slot, 0, mask=slot < slots)
        tl.store(tiles_ptr + 2 * slots + slot, 0, mask=slot < slots)


def schedule(cu_seqlens: Tensor, total_tokens: int, block: int) -> Tensor:
    """(3, slots) int32 on the device of ``cu_seqlens``: first row, length and offset of each tile.

    Longest sequence first; an unused slot has length 0. Nothing comes back to the host.
    """
    num_seqs = cu_seqlens.shape[0] - 1
    slots = _common.slots(total_tokens, num_seqs, block)
    tiles = _common.empty((3, slots), torch.int32, cu_seqlens.device)
    seqs = 4 if _common.chip_of(cu_seqlens.device).backend == "cpu" else 32
    _common.launch(
        _schedule_kernel, (triton.cdiv(num_seqs, seqs),), cu_seqlens, tiles, num_seqs, slots,
        BLOCK=block, SEQS=seqs, STEP=16, num_warps=4,
    )  # fmt: skip
    return tiles


@triton.jit
def tile_of(tiles_ptr, slot, slots):
    """(first row of the sequence, its length, the tile's offset) from the tile list."""
    start = tl.load(tiles_ptr + slot)
    length = tl.load(tiles_ptr + slots + slot)
    first = tl.load(tiles_ptr + 2 * slots + slot)
    return start, length, first
