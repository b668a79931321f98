"""Backward of the span scores: every row is made again, nothing is added by atomics.

start and end: a program owns BLOCK_M words and BLOCK_R columns and walks the widths; it adds
``(grad . labels)`` of the spans that start at a word where their row is positive, and of those that
end there. Each product is made twice, the price of a fixed order.
labels: a program owns BLOCK_C labels and BLOCK_R columns and walks the spans of one sequence, or
one chunk of them where the chip would stand idle; a second kernel adds the chunks in order.
FLOPs: 6 R C a span.

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  wgmma in both kernels, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import cast, dot, locate, precision, wide
from fastenc.triton_kernels._spans import (
    Launch,
    chunk_of,
    label_launches,
    locate_spans,
    pair,
    span_keep,
    span_rows,
    span_slots,
    tile_spans,
    word_launches,
)


@triton.jit
def _grad_rows(
    grad_ptr, labels_ptr, held, word, exists, column, size, num_labels, grad_stride_i,
    grad_stride_c, label_stride, ONE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``grad . labels`` of one span a word; ``held``: the labels where ONE block has them all."""
    rows = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    grads = grad_ptr + wide(word)[:, None] * grad_stride_i
    for base in range(0, num_labels, BLOCK_C):
        label = base + tl.arange(0, BLOCK_C)
        there = label < num_labels
        mask = exists[:, None] & there[None, :]
        g = tl.load(grads + label[None, :] * grad_stride_c, mask=mask, other=0.0)
        v = held
        if not ONE:
            v = _labels(labels_ptr, label, there, column, size, label_stride, BLOCK_R)
        rows = dot(g, v, rows, PRECISION)
    return rows


@triton.jit
def _labels(labels_ptr, label, there, column, size, stride, BLOCK_R: tl.constexpr):
    col = column + tl.arange(0, BLOCK_R)[None, :]
    ptrs = labels_ptr + wide(label)[:, None] * stride + col
    return tl.load(ptrs, mask=there[:, None] & (col < size), other=0.0)


@triton.jit(do_not_specialize=["num_seqs", "threshold"])
def words_backward_kernel(
    grad_ptr, start_ptr, end_ptr, labels_ptr, cu_ptr, seed_ptr, dstart_ptr, dend_ptr, num_seqs,
    max_width, size, num_labels, threshold, keep_scale, start_stride, end_stride, label_stride_n,
    label_stride_c, grad_stride_i, grad_stride_w, grad_stride_c, ONE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK_R)
    start, length, first, seq = locate(tl.program_id(0) // blocks, cu_ptr, num_seqs, BLOCK_M)
    if first >= length:
        return
    column = (tl.program_id(0) % blocks) * BLOCK_R
    col = column + tl.arange(0, BLOCK_R)
    word = first + tl.arange(0, BLOCK_M)
    begin = wide(start)
    start_ptr += begin * start_stride
    end_ptr += begin * end_stride
    grad_ptr += begin * grad_stride_i
    labels_ptr += wide(seq) * label_stride_n
    here = tl.minimum(word, length - 1)
    label = tl.arange(0, BLOCK_C)
    held = label
    if ONE:
        held = _labels(
            labels_ptr, label, label < num_labels, column, size, label_stride_c, BLOCK_R
        )  # fmt: skip
    dstart = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dend = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for width in range(0, max_width):
        widths = tl.zeros((BLOCK_M,), tl.int32) + width
        grads = grad_ptr + wide(width) * grad_stride_w
        tail = tl.minimum(here + width, length - 1)
        positive = pair(start_ptr, end_ptr, here, tail, col, size, start_stride, end_stride) > 0
        d = _grad_rows(
            grads, labels_ptr, held, here, word + width < length, column, size, num_labels,
            grad_stride_i, grad_stride_c, label_stride_c, ONE, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        if DROPOUT:
            positive = positive & span_keep(
                seed_ptr, threshold, start + word, widths, column, BLOCK_M, BLOCK_R
            )
        dstart += tl.where(positive, d, 0.0)
        head = tl.maximum(here - width, 0)
        positive = pair(start_ptr, end_ptr, head, here, col, size, start_stride, end_stride) > 0
        d = _grad_rows(
            grads, labels_ptr, held, head, (word >= width) & (word < length), column, size,
            num_labels, grad_stride_i, grad_stride_c, label_stride_c, ONE, PRECISION, BLOCK_M,
            BLOCK_C, BLOCK_R,
        )  # fmt: skip
        if DROPOUT:
            positive = positive & span_keep(
                seed_ptr, threshold, start + word - width, widths, column, BLOCK_M, BLOCK_R
            )
        dend += tl.where(positive, d, 0.0)
    offsets = wide(start + word)[:, None] * size + col[None, :]
    stored = (word < length)[:, None] & (col < size)[None, :]
    dtype: tl.constexpr = dstart_ptr.dtype.element_ty
    tl.store(dstart_ptr + offsets, cast(dstart * keep_scale, dtype), mask=stored)
    tl.store(dend_ptr + offsets, cast(dend * keep_scale, dtype), mask=stored)


@triton.jit(do_not_specialize=["num_seqs", "threshold"])
def labels_backward_kernel(
    grad_ptr, start_ptr, end_ptr, cu_ptr, seed_ptr, dlabels_ptr, dbias_ptr, num_seqs, max_width,
    size, num_labels, threshold, keep_scale, start_stride, end_stride, grad_stride_i, grad_stride_w,
    grad_stride_c, CHUNK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One place of (slot or sequence, label, column); CHUNK spans, 0 for all of the sequence's."""
    place = tl.program_id(0)
    first = 0
    if CHUNK > 0:
        start, length, first, _ = locate_spans(place, cu_ptr, num_seqs, max_width, CHUNK)
        if first >= length * max_width:
            return
    else:
        start = tl.load(cu_ptr + place)
        length = tl.load(cu_ptr + place + 1) - start
    last = length * max_width
    if CHUNK > 0:
        last = tl.minimum(first + CHUNK, last)
    label = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.program_id(2) * BLOCK_R
    begin = wide(start)
    start_ptr += begin * start_stride
    end_ptr += begin * end_stride
    grad_ptr += begin * grad_stride_i
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    dlabels = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for base in range(first, last, BLOCK_M):
        _span, head, width, tail, _inside, exists = tile_spans(base, length, max_width, BLOCK_M)
        rows = span_rows(
            start_ptr, end_ptr, seed_ptr, threshold, head, tail, start + head, width, column, size,
            start_stride, end_stride, dtype, DROPOUT, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        spans = wide(head) * grad_stride_i + wide(width) * grad_stride_w
        mask = exists[:, None] & (label < num_labels)[None, :]
        ptrs = grad_ptr + spans[:, None] + label[None, :] * grad_stride_c
        g = tl.load(ptrs, mask=mask, other=0.0)
        dlabels = dot(tl.trans(rows), g, dlabels, PRECISION)
        dbias += tl.sum(g.to(tl.float32), axis=0)
    col = column + tl.arange(0, BLOCK_R)
    offsets = (wide(place) * num_labels + label[None, :]) * size + col[:, None]
    stored = (label < num_labels)[None, :] & (col < size)[:, None]
    out = cast(dlabels * keep_scale, dlabels_ptr.dtype.element_ty)
    tl.store(dlabels_ptr + offsets, out, mask=stored)
    if tl.program_id(2) == 0:
        sums = cast(dbias, dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + wide(place) * num_labels + label, sums, mask=label < num_labels)


@triton.jit
def add_chunks_kernel(
    part_ptr, cu_ptr, out_ptr, max_width, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """(num_seqs, count): the chunks of each sequence added in order."""
    seq = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(cu_ptr + seq)
    spans = (tl.load(cu_ptr + seq + 1) - start) * max_width
    slot = wide(start) * max_width // CHUNK + seq
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(0, tl.cdiv(spans, CHUNK)):
        total += tl.load(part_ptr + (slot + chunk) * count + col, mask=col < count, other=0.0)
    out = cast(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide(seq) * count + col, out, mask=col < count)


def backward(
    grad: Tensor, start: Tensor, end: Tensor, labels: Tensor, cu_words: Tensor, max_width: int,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    words, size = start.shape
    num_seqs, num_labels, _ = labels.shape
    dtype, device = start.dtype, start.device
    dstart, dend, dlabels = (_common.empty(x.shape, dtype, device) for x in (start, end, labels))
    dbias = _common.empty((num_seqs, num_labels), dtype, device)
    if words == 0 or num_labels == 0:
        return dstart.zero_(), dend.zero_(), dlabels.zero_(), dbias.zero_()
    start, end, labels, cu = (_common.unit_rows(x) for x in (start, end, labels, cu_words))
    chip = _common.chip_of(device)
    scalars = max_width, size, num_labels, int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)
    row_strides = start.stride(0), end.stride(0)
    flags = {"DROPOUT": dropout_p > 0, "PRECISION": precision(dtype)}

    def of_words(launch: Launch) -> None:
        tiles = _common.slots(words, num_seqs, launch.block_m)
        _common.launch(
            words_backward_kernel, (tiles * triton.cdiv(size, launch.block_r),), grad, start, end,
            labels, cu, seed, dstart, dend, num_seqs, *scalars, *row_strides, *labels.stride()[:2],
            *grad.stride(), ONE=num_labels <= launch.block_c, **flags, **launch.constants(),
        )  # fmt: skip

    def of_labels(launch: Launch) -> None:
        chunk = chunk_of(num_labels, size, launch, chip)
        places = span_slots(words, num_seqs, max_width, chunk) if chunk else num_seqs
        grid = places, triton.cdiv(num_labels, launch.block_c), max(
            triton.cdiv(size, launch.block_r), 1
        )  # fmt: skip
        out, out_bias = dlabels, dbias
        if chunk:
            out = _common.empty((places, num_labels, size), torch.float32, device)
            out_bias = _common.empty((places, num_labels), torch.float32, device)
        _common.launch(
            labels_backward_kernel, grid, grad, start, end, cu, seed, out, out_bias, num_seqs,
            *scalars, *row_strides, *grad.stride(), CHUNK=chunk, **flags, **launch.constants(),
        )  # fmt: skip
        for part, whole in ((out, dlabels), (out_bias, dbias)) if chunk else ():
            count = whole[0].numel()
            _common.launch(
                add_chunks_kernel, (num_seqs, triton.cdiv(count, 1024)), part, cu, whole,
                max_width, count, CHUNK=chunk, BLOCK=1024, num_warps=4,
            )  # fmt: skip

    for op, choices, run in (
        ("span_score_words", word_launches(num_labels, dtype, chip), of_words),
        ("span_score_labels", label_launches(num_labels, dtype, chip), of_labels),
    ):
        key = (op, size, choices[0].block_c, dtype, dropout_p > 0, chip.name)
        _common.run_chosen(key, device, choices, run)
    return dstart, dend, dlabels, dbias
