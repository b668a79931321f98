"""What the span kernels share: tiles of spans, the rows of spans, dropout, launch choice.

The spans of a sequence of n words are numbered ``word * max_width + width``; a tile is BLOCK_M of
them, whose rows ``relu(start_word + end_{word + width})`` are made in registers, BLOCK_R columns at
a time, and multiplied at once. A row of ``start`` or ``end`` is read max_width times, from L1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import Chip, cast, dot, wide

SPAN_TAG = tl.constexpr(1)  # fourth counter word of the dropout mask, as ops/_span_ref.py has it


@dataclass(frozen=True)
class Launch:
    """A tile of ``block_m`` spans (or words) meets ``block_c`` labels, ``block_r`` columns each."""

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int = 2

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "BLOCK_R": self.block_r,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


Launches = tuple[Launch, ...]


def label_block(labels: int, widest: int) -> int:
    """Labels a tile takes at once: all of them in 16, 32 or more, up to ``widest``."""
    return max(16, min(_common.power_of_2(labels), widest))


def score_launches(labels: int, dtype: torch.dtype, chip: Chip) -> Launches:
    """Launches of the scores, the default first."""
    if chip.backend == "cpu":
        return (Launch(32, 16, 32, 4),)
    if dtype == torch.float32:
        return (Launch(64, label_block(labels, 32), 32, 4),)
    if labels <= 32:
        block_c = label_block(labels, 32)
        return (Launch(128, block_c, 64, 4), Launch(64, block_c, 64, 4))
    return (Launch(128, 64, 64, 8),)  # 128 labels spill


def candidate_launch(labels: int, dtype: torch.dtype, chip: Chip) -> Launch:
    """The launch of the candidates: 128 spans spill, and so do 64 with 64 labels, or in fp32."""
    if chip.backend == "cpu":
        return score_launches(labels, dtype, chip)[0]
    return Launch(32, 16, 32, 4) if dtype == torch.float32 else Launch(64, 16, 64, 4)


def word_launches(labels: int, dtype: torch.dtype, chip: Chip) -> Launches:
    """Launches of the gradient of start and end: ``block_m`` words."""
    if chip.backend == "cpu":
        return (Launch(16, 16, 32, 4),)
    if dtype == torch.float32:  # 32 words spill, and on Triton 3.6 one stage does
        return (Launch(16, label_block(labels, 32), 32, 4),)
    return (Launch(64, label_block(labels, 64), 64, 8, 1),)


def label_launches(labels: int, dtype: torch.dtype, chip: Chip) -> Launches:
    """Launches of the gradient of the labels: ``block_m`` spans a step."""
    if chip.backend == "cpu":
        return (Launch(32, 16, 32, 4),)
    if dtype == torch.float32:
        return (Launch(32, label_block(labels, 32), 32, 4),)
    return (Launch(64, label_block(labels, 64), 64, 4),)


def chunk_of(labels: int, size: int, launch: Launch, chip: Chip) -> int:
    """Spans a program of the labels' gradient adds up, 0 for all of a sequence's.

    Partial sums take ``C * R`` floats a chunk, so only a gradient too small to fill the chip alone
    is cut up. Depends on nothing that changes with the batch.
    """
    programs = triton.cdiv(labels, launch.block_c) * triton.cdiv(size, launch.block_r)
    if programs >= 2 * chip.multiprocessors:
        return 0
    return 64 if chip.backend == "cpu" else 1024


def span_slots(words: int, num_seqs: int, max_width: int, block: int) -> int:
    """The number of slots that :func:`locate_spans` divides among the sequences."""
    return words * max_width // block + num_seqs


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


# ---- device functions --------------------------------------------------------------------------


@triton.jit
def locate_spans(slot, cu_ptr, num_seqs, max_width, BLOCK: tl.constexpr):
    """As :func:`_common.locate`, in spans: (first word of the sequence, its words, the tile's first
    span in it, the sequence); empty if the first span is past the sequence's last."""
    SCAN: tl.constexpr = 16 if _common.INTERPRET else 1024
    begun = 0
    for base in range(0, num_seqs, SCAN):
        seqs = base + tl.arange(0, SCAN)
        valid = seqs < num_seqs
        first = tl.load(cu_ptr + seqs, mask=valid, other=0).to(tl.int64) * max_width
        begun += tl.sum((valid & (first // BLOCK + seqs <= slot)).to(tl.int32))
    seq = begun - 1
    start = tl.load(cu_ptr + seq)
    length = tl.load(cu_ptr + seq + 1) - start
    before = wide(start) * max_width // BLOCK + seq
    return start, length, (slot - before).to(tl.int32) * BLOCK, seq


@triton.jit
def pair(start_ptr, end_ptr, head, tail, col, size, start_stride, end_stride):
    """``start_head + end_tail`` in the columns ``col``, fp32: (rows, columns)."""
    inside = (col < size)[None, :]
    heads = start_ptr + wide(head)[:, None] * start_stride + col[None, :]
    tails = end_ptr + wide(tail)[:, None] * end_stride + col[None, :]
    a = tl.load(heads, mask=inside, other=0.0).to(tl.float32)
    return a + tl.load(tails, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def span_keep(
    seed_ptr, threshold, word, width, column, ROWS: tl.constexpr, COLS: tl.constexpr,
    TAG: tl.constexpr = SPAN_TAG,
):  # fmt: skip
    """What dropout keeps of the spans (``word`` packed, ``width``), COLS columns from ``column`` (a
    multiple of 4) on: (ROWS, COLS). One Philox counter serves four columns."""
    seed = tl.load(seed_ptr)
    key_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros((ROWS, COLS // 4), tl.uint32)
    group = (column // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :] + zero
    word = word.to(tl.uint32)[:, None] + zero
    width = width.to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox_impl(group, word, width, zero + TAG, key_low, key_high)
    limit = threshold.to(tl.uint32)
    kept = (w0 >= limit).to(tl.int32) | ((w1 >= limit).to(tl.int32) << 1)
    kept = kept | ((w2 >= limit).to(tl.int32) << 2) | ((w3 >= limit).to(tl.int32) << 3)
    place = tl.arange(0, 4)
    return tl.reshape((kept[:, :, None] >> place[None, None, :]) & 1, (ROWS, COLS)) != 0


@triton.jit
def span_rows(
    start_ptr, end_ptr, seed_ptr, threshold, head, tail, word, width, column, size, start_stride,
    end_stride, DTYPE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The rows of spans in COLS columns from ``column`` on; kept ones are not scaled yet."""
    col = column + tl.arange(0, COLS)
    rows = pair(start_ptr, end_ptr, head, tail, col, size, start_stride, end_stride)
    rows = tl.where(rows > 0, rows, tl.where(rows == rows, 0.0, rows))
    if DROPOUT:
        keep = span_keep(seed_ptr, threshold, word, width, column, ROWS, COLS)
        rows = tl.where(keep, rows, 0.0)
    return cast(rows, DTYPE)


@triton.jit
def tile_spans(first, length, max_width, BLOCK_M: tl.constexpr):
    """(span, its word, its width, its last word, whether the tile has it, whether it exists) of a
    tile; words are clamped to the sequence."""
    span = first + tl.arange(0, BLOCK_M)
    word = span // max_width
    width = span - word * max_width
    inside = span < length * max_width
    tail = word + width
    exists = inside & (tail < length)
    return span, tl.minimum(word, length - 1), width, tl.minimum(tail, length - 1), inside, exists


@triton.jit
def tile_logits(
    start_ptr, end_ptr, labels_ptr, bias_ptr, seed_ptr, threshold, keep_scale, start, head, width,
    tail, label, num_labels, size, start_stride, end_stride, label_stride, bias_stride,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of spans for the labels ``label``, (BLOCK_M, BLOCK_C) fp32.

    ``start_ptr`` and ``end_ptr``: the sequence's first word, ``start`` in the packed batch;
    ``labels_ptr`` and ``bias_ptr``: the sequence's.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    there = (label < num_labels)[:, None]
    rows_of = labels_ptr + wide(label)[:, None] * label_stride
    logits = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for column in range(0, size, BLOCK_R):
        rows = span_rows(
            start_ptr, end_ptr, seed_ptr, threshold, head, tail, start + head, width, column, size,
            start_stride, end_stride, dtype, DROPOUT, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        col = column + tl.arange(0, BLOCK_R)[None, :]
        v = tl.load(rows_of + col, mask=there & (col < size), other=0.0)
        logits = dot(rows, tl.trans(v), logits, PRECISION)
    if DROPOUT:
        logits = logits * keep_scale
    if BIAS:
        bias = tl.load(bias_ptr + label * bias_stride, mask=label < num_labels, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    return logits
