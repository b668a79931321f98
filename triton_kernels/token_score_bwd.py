"""Backward of the scores of words against labels: hidden rows made once more, no atomics.

Words are taken some at a time, so many that the gradient of their hidden rows, dY, fits a workspace
of WORKSPACE elements that L2 can hold. With X = token_factor * label_factor and G the incoming
gradient, a pass has four steps:

    hidden   dY = G out_weight where the hidden row is positive; a part of dout_weight a tile
    factors  dX = dY weight
    weight   dweight += dY^T X, X made again in registers
    sums     over a word's labels: dtoken, dtoken_factor; over a label's words, one after the other:
             dlabel, dlabel_factor

Every sum has one order. FLOPs: 6 R D a pair, those of the three products and no more.

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  wgmma in the three products, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import cast, dot, precision, wide
from fastenc.triton_kernels._tokens import (
    Launch,
    factor_tile,
    hidden_tile,
    pair_launches,
    sequence_of,
    tile_pairs,
)

WORKSPACE = 1 << 24  # elements of dY, 32 MB in 16 bits


@triton.jit(do_not_specialize=["first", "last", "threshold"])
def hidden_backward_kernel(
    grad_ptr, token_ptr, label_ptr, s_ptr, t_ptr, weight_ptr, outs_ptr, seq_ptr, seed_ptr, dy_ptr,
    parts_ptr, first, last, num_labels, size, factors, threshold, keep_scale, grad_stride_i,
    grad_stride_c, grad_stride_o, token_stride, label_stride_n, label_stride_c, s_stride,
    t_stride_n, t_stride_c, weight_stride, outs_stride, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dY of the pairs [first, last), and G^T Y of each tile as (tiles, 3, R)."""
    blocks = tl.cdiv(size, BLOCK_R)
    tile = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK_R
    begin = wide(first) + wide(tile) * BLOCK_M
    word, label, seq, exists = tile_pairs(seq_ptr, begin, last, num_labels, BLOCK_M)
    rows = hidden_tile(
        token_ptr, label_ptr, s_ptr + wide(word)[:, None] * s_stride,
        t_ptr + (wide(seq) * t_stride_n + wide(label) * t_stride_c)[:, None], weight_ptr, seed_ptr,
        threshold, word, label, seq, exists, column, size, factors, token_stride, label_stride_n,
        label_stride_c, weight_stride, DROPOUT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    col = column + tl.arange(0, BLOCK_R)
    inside = col < size
    grads = grad_ptr + wide(word) * grad_stride_i + wide(label) * grad_stride_c
    parts = parts_ptr + wide(tile) * 3 * size + col
    d = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for o in tl.static_range(3):
        g = tl.load(grads + o * grad_stride_o, mask=exists, other=0.0).to(tl.float32)
        v = tl.load(outs_ptr + o * outs_stride + col, mask=inside, other=0.0).to(tl.float32)
        d += g[:, None] * v[None, :]
        kept = tl.where(exists[:, None], rows, 0.0)
        part = tl.sum(g[:, None] * kept, axis=0) * keep_scale
        tl.store(parts + o * size, part, mask=inside)
    d = tl.where(rows > 0, d * keep_scale, 0.0)
    place = wide(tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = exists[:, None] & inside[None, :]
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    tl.store(dy_ptr + place[:, None] * size + col[None, :], cast(d, dtype), mask=stored)


@triton.jit(do_not_specialize=["count"])
def factors_backward_kernel(
    dy_ptr, weight_ptr, dx_ptr, count, size, factors, weight_stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dX = dY weight of ``count`` pairs, fp32."""
    blocks = tl.cdiv(factors, BLOCK_D)
    place = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = place < count
    inside = (k < factors)[None, :]
    dy_rows = dy_ptr + wide(place)[:, None] * size
    dx = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for column in range(0, size, BLOCK_R):
        col = column + tl.arange(0, BLOCK_R)
        dy = tl.load(
            dy_rows + col[None, :], mask=exists[:, None] & (col < size)[None, :], other=0.0
        )
        rows = weight_ptr + wide(col)[:, None] * weight_stride
        w = tl.load(rows + k[None, :], mask=(col < size)[:, None] & inside, other=0.0)
        dx = dot(dy, w, dx, PRECISION)
    place_of = dx_ptr + wide(place)[:, None] * factors + k[None, :]
    tl.store(place_of, dx, mask=exists[:, None] & inside)


@triton.jit(do_not_specialize=["first", "last"])
def weight_backward_kernel(
    dy_ptr, s_ptr, t_ptr, seq_ptr, dweight_ptr, first, last, num_labels, size, factors, s_stride,
    t_stride_n, t_stride_c, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dweight += dY^T X over the pairs [first, last), fp32."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (col < size)[None, :]
    stored = (col < size)[:, None] & (k < factors)[None, :]
    place_of = dweight_ptr + wide(col)[:, None] * factors + k[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for base in range(0, last - first, BLOCK_M):
        begin = wide(first) + base
        word, label, seq, exists = tile_pairs(seq_ptr, begin, last, num_labels, BLOCK_M)
        s_rows = s_ptr + wide(word)[:, None] * s_stride
        t_rows = t_ptr + (wide(seq) * t_stride_n + wide(label) * t_stride_c)[:, None]
        x = factor_tile(s_rows, t_rows, exists, k, factors, dtype)
        place = wide(base + tl.arange(0, BLOCK_M))[:, None] * size
        dy = tl.load(dy_ptr + place + col[None, :], mask=exists[:, None] & inside, other=0.0)
        total = dot(tl.trans(dy), x, total, PRECISION)
    total += tl.load(place_of, mask=stored, other=0.0)
    tl.store(place_of, total, mask=stored)


@triton.jit(do_not_specialize=["first"])
def sum_labels_kernel(
    pairs_ptr, t_ptr, seq_ptr, out_ptr, first, num_labels, size, t_stride_n, t_stride_c,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of a word's pairs, times label_factor if FACTOR, added over its labels."""
    place = tl.program_id(0)
    word = first + place
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pairs_ptr += wide(place) * num_labels * size
    if FACTOR:
        t_ptr += wide(tl.load(seq_ptr + word)) * t_stride_n
    total = tl.zeros((BLOCK,), tl.float32)
    for label in range(0, num_labels):
        x = tl.load(pairs_ptr + wide(label) * size + col, mask=col < size, other=0.0)
        x = x.to(tl.float32)
        if FACTOR:
            t = tl.load(t_ptr + wide(label) * t_stride_c + col, mask=col < size, other=0.0)
            x *= t.to(tl.float32)
        total += x
    out = cast(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide(word) * size + col, out, mask=col < size)


@triton.jit(do_not_specialize=["first", "last"])
def sum_words_kernel(
    pairs_ptr, s_ptr, cu_ptr, out_ptr, first, last, num_labels, size, s_stride,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of a label's pairs, times token_factor if FACTOR, added to ``out``, fp32, over those of
    its words that are in [first, last): one after the other, wherever a pass cuts them."""
    seq, label = tl.program_id(0), tl.program_id(1)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.maximum(tl.load(cu_ptr + seq), first)
    end = tl.minimum(tl.load(cu_ptr + seq + 1), last)
    out_ptr += (wide(seq) * num_labels + label) * size
    total = tl.load(out_ptr + col, mask=col < size, other=0.0)
    for word in range(begin, end):
        row = wide(word - first) * num_labels + label
        x = tl.load(pairs_ptr + row * size + col, mask=col < size, other=0.0).to(tl.float32)
        if FACTOR:
            s = tl.load(s_ptr + wide(word) * s_stride + col, mask=col < size, other=0.0)
            x *= s.to(tl.float32)
        total += x
    tl.store(out_ptr + col, total, mask=col < size)


def pass_words(words: int, labels: int, size: int) -> int:
    """Words of a pass: as many as the workspace holds, one at least."""
    return min(words, max(1, WORKSPACE // max(labels * size, 1)))


def backward(
    grad: Tensor, tensors: tuple[Tensor, ...], cu_words: Tensor, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, device = tensors[0].dtype, tensors[0].device
    token, label, s, t, weight, outs = (_common.unit_rows(x) for x in tensors)
    words, size = token.shape
    num_seqs, num_labels, factors = t.shape
    dtoken, ds = (_common.empty(x.shape, dtype, device) for x in (token, s))
    dlabel, dt, dweight, douts = (
        _common.empty(x.shape, torch.float32, device).zero_() for x in (label, t, weight, outs)
    )
    dbias = grad.sum((0, 1), dtype=torch.float32)
    if words == 0 or num_labels == 0:
        totals = dtoken.zero_(), dlabel, ds.zero_(), dt, dweight, douts, dbias
        return tuple(x.to(dtype) for x in totals)
    cu, sequences = _common.unit_rows(cu_words), sequence_of(words, cu_words)
    step = pass_words(words, num_labels, size)
    dy = _common.empty((step * num_labels, size), dtype, device)
    dx = _common.empty((step * num_labels, factors), torch.float32, device)
    chip = _common.chip_of(device)
    launch: Launch = pair_launches(dtype, chip)[0]
    options = {"PRECISION": precision(dtype), **launch.constants()}
    tiles_of = triton.cdiv(step * num_labels, launch.block_m)
    parts = _common.empty((tiles_of, 3, size), torch.float32, device)
    over_r, over_d = triton.cdiv(size, launch.block_r), triton.cdiv(factors, launch.block_d)
    for first in range(0, words, step):
        last = min(first + step, words)
        pairs = first * num_labels, last * num_labels
        count = pairs[1] - pairs[0]
        tiles = triton.cdiv(count, launch.block_m)
        _common.launch(
            hidden_backward_kernel, (tiles * over_r,), grad, token, label, s, t, weight, outs,
            sequences, seed, dy, parts, *pairs, num_labels, size, factors, int(dropout_p * 2**32),
            1.0 / (1.0 - dropout_p), *grad.stride(), token.stride(0), *label.stride()[:2],
            s.stride(0), *t.stride()[:2], weight.stride(0), outs.stride(0), DROPOUT=dropout_p > 0,
            **options,
        )  # fmt: skip
        douts += parts[:tiles].sum(0)
        _common.launch(
            factors_backward_kernel, (tiles * over_d,), dy, weight, dx, count, size, factors,
            weight.stride(0), **options,
        )  # fmt: skip
        _common.launch(
            weight_backward_kernel, (over_r, over_d), dy, s, t, sequences, dweight, *pairs,
            num_labels, size, factors, s.stride(0), *t.stride()[:2], **options,
        )  # fmt: skip
        for rows, of_words, of_labels, factor in (
            (dy, dtoken, dlabel, False), (dx, ds, dt, True)
        ):  # fmt: skip
            width, block = rows.shape[1], 512
            columns = triton.cdiv(width, block)
            _common.launch(
                sum_labels_kernel, (last - first, columns), rows, t, sequences, of_words, first,
                num_labels, width, *t.stride()[:2], FACTOR=factor, BLOCK=block, num_warps=2,
            )  # fmt: skip
            _common.launch(
                sum_words_kernel, (num_seqs, num_labels, columns), rows, s, cu, of_labels, first,
                last, num_labels, width, s.stride(0), FACTOR=factor, BLOCK=block, num_warps=2,
            )  # fmt: skip
    return dtoken, dlabel.to(dtype), ds, dt.to(dtype), dweight.to(dtype), douts.to(dtype), (
        dbias.to(dtype)
    )  # fmt: skip
