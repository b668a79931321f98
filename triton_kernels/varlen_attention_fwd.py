"""Forward of packed attention: any window, any length; flash style with a running maximum.

A program owns BLOCK_M query rows of one (sequence, head), taken from a tile list that is made on
the device, longest sequence first, and walks the keys that its rows can see in blocks of BLOCK_N.
Softmax in base 2 with fp32 statistics. Keys past the end are loaded from the last row and masked,
in the last block alone where there is no window. FLOPs: 4 head_dim a query-key pair.

Ladder (compiled for sm_90, bf16, head_dim 64; has not run on a GPU, so no time is claimed):
    v1  wgmma, cp.async in num_stages buffers, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastenc.triton_kernels._attention import (
    accumulate,
    bias_of,
    dot_heads,
    in_window,
    keep_mask,
    load_head,
    rotate_head,
    scale_head,
    store_head,
    tile_of,
    zero_head,
)
from fastenc.triton_kernels._common import LN_2, LOG2_E, cast, wide


@triton.jit
def masked_scores(
    s, distance, seen, bias_ptr, radius, bias_stride, scale, BIAS: tl.constexpr, RAW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Scores in base 2, those not ``seen`` -inf. ``scale`` includes log2(e).

    RAW (a positive scale and no bias) leaves the scale to the exponential, one fused
    multiply-add an element.
    """
    if not RAW:
        s = s * scale
    if BIAS:
        s += bias_of(bias_ptr, distance, radius, bias_stride)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def row_peaks(s, scale, RAW: tl.constexpr):
    peak = tl.max(s, axis=1)
    if RAW:
        peak = peak * scale
    return peak


@triton.jit
def powers(s, base, scale, RAW: tl.constexpr):
    """``2 ** (scores - base)``; ``base`` broadcasts over ``s``."""
    if RAW:
        s = s * scale
    return tl.exp2(s - base)


@triton.jit
def _attend(
    top, norm, acc, q, k_ptr, v_ptr, seed_ptr, bias_ptr, key, row, start, length, left, right,
    scale, threshold, head, k_stride, v_stride, bias_stride, radius,
    QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, the running sum, the accumulator."""
    step = tl.arange(0, BLOCK_N)
    rows = step
    if MASKED:
        rows = tl.minimum(step, length - 1 - key)
    k = load_head(k_ptr + wide(key) * k_stride, rows, k_stride, QK_PIECES)
    s = dot_heads(q, k, BLOCK_M, BLOCK_N, len(QK_PIECES), PRECISION)
    distance = (key + step)[None, :] - row[:, None]
    if WINDOWED:
        seen = in_window(row[:, None], (key + step)[None, :], length, left, right)
    else:
        seen = (key + step)[None, :] < length
    s = masked_scores(s, distance, seen, bias_ptr, radius, bias_stride, scale, BIAS, RAW, MASKED)
    higher = tl.maximum(top, row_peaks(s, scale, RAW))
    base = higher
    if WINDOWED or BIAS:  # a row may have seen no key so far
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = powers(s, base[:, None], scale, RAW)
    fade = tl.exp2(top - base)
    norm = norm * fade + tl.sum(p, axis=1)
    acc = scale_head(acc, fade[:, None], V_PIECES)
    if DROPOUT:
        keep = keep_mask(seed_ptr, threshold, start + row, key, head, BLOCK_M, BLOCK_N, False)
        p = tl.where(keep, p, 0.0)
    v = load_head(v_ptr + wide(key) * v_stride, rows, v_stride, V_PIECES)
    acc = accumulate(acc, cast(p, v_ptr.dtype.element_ty), v, len(V_PIECES), PRECISION)
    return higher, norm, acc


@triton.jit
def finish(out_ptr, lse_ptr, top, norm, acc, rows, inside, keep_scale, out_stride,
           PIECES: tl.constexpr):  # fmt: skip
    """Divide by the sum and store; a row without a key gives zeros and -inf."""
    empty = norm == 0.0
    safe = tl.where(empty, 1.0, norm)
    acc = scale_head(acc, (keep_scale / safe)[:, None], PIECES)
    store_head(out_ptr, rows, out_stride, acc, inside, PIECES)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN_2)
    tl.store(lse_ptr + rows, lse, mask=inside)


@triton.jit(do_not_specialize=["slots", "total_tokens", "left", "right", "threshold"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, cos_ptr, sin_ptr, seed_ptr, bias_ptr,
    slots, total_tokens, heads, left, right, scale, threshold, keep_scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    out_stride_t, out_stride_h, cos_stride, sin_stride, bias_stride_h, bias_stride_d, radius,
    QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr, ROPE: tl.constexpr, WINDOWED: tl.constexpr,
    PEEL: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    start, length, first = tile_of(tiles_ptr, tl.program_id(0) // heads, slots)
    if first >= length:
        return
    step = tl.arange(0, BLOCK_M)
    row = first + step
    rows = tl.minimum(step, length - 1 - first)
    q_ptr += wide(start + first) * q_stride_t + wide(head) * q_stride_h
    q = load_head(q_ptr, rows, q_stride_t, QK_PIECES)
    if ROPE:
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        q = rotate_head(
            q, first + rows, cos_ptr, sin_ptr, cos_stride, sin_stride, QK_PIECES, False, dtype
        )
    k_ptr += wide(start) * k_stride_t + wide(head) * k_stride_h
    v_ptr += wide(start) * v_stride_t + wide(head) * v_stride_h
    if BIAS:
        bias_ptr += head * bias_stride_h
    scale = scale * LOG2_E
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_head(BLOCK_M, V_PIECES)
    low = 0
    high = length
    if WINDOWED:
        low = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        high = tl.minimum(first + BLOCK_M + right, length)
    if PEEL:
        high = length // BLOCK_N * BLOCK_N
    for key in range(low, high, BLOCK_N):
        top, norm, acc = _attend(
            top, norm, acc, q, k_ptr, v_ptr, seed_ptr, bias_ptr, key, row, start, length, left,
            right, scale, threshold, head, k_stride_t, v_stride_t, bias_stride_d, radius,
            QK_PIECES, V_PIECES, not PEEL, WINDOWED, DROPOUT, BIAS, RAW, PRECISION, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    if PEEL and high < length:
        top, norm, acc = _attend(
            top, norm, acc, q, k_ptr, v_ptr, seed_ptr, bias_ptr, high, row, start, length, left,
            right, scale, threshold, head, k_stride_t, v_stride_t, bias_stride_d, radius,
            QK_PIECES, V_PIECES, True, WINDOWED, DROPOUT, BIAS, RAW, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out_ptr += wide(start + first) * out_stride_t + wide(head) * out_stride_h
    lse_ptr += wide(head) * total_tokens + start + first
    finish(out_ptr, lse_ptr, top, norm, acc, step, row < length, keep_scale, out_stride_t, V_PIECES)
