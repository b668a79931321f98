"""Backward of packed attention, without atomics: dq by query tiles, dk and dv by key tiles.

With P = 2^(S - lse), delta = rowsum(out * dout) - dlse and dS = P (dP - delta):
    dq = scale dS K,   dk = scale dS^T Q,   dv = P^T dout.
Each tile owns its rows and walks the other side in blocks, so every sum has one order and two runs
are bit-equal. S and dP are computed twice (7 products instead of 5), the price of no atomics.

General form: two kernels over the tile list; the first also writes delta for the second. Windowed
form: one kernel whose program does both parts of one tile, delta on the fly, neighbours from L2:
it reads q, k, v, out, dout and writes dq, dk, dv once, 16 head_dim bytes a token-head in bf16.
RoPE: the windowed form rotates q and k as it loads them, the general one takes them rotated; both
undo the rotation of dq and dk before they round them.

Ladder (compiled for sm_90, bf16, head_dim 64; has not run on a GPU, so no time is claimed):
    v1  wgmma with P^T and dS^T from registers, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastenc.triton_kernels._attention import (
    accumulate,
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
from fastenc.triton_kernels._common import LOG2_E, cast, locate, wide
from fastenc.triton_kernels.varlen_attention_fwd import masked_scores, powers


@triton.jit
def _load_rotated(
    ptr, rows, stride, pos, cos_ptr, sin_ptr, cos_stride, sin_stride, PIECES: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    x = load_head(ptr, rows, stride, PIECES)
    if ROTATE:
        dtype: tl.constexpr = ptr.dtype.element_ty
        x = rotate_head(x, pos, cos_ptr, sin_ptr, cos_stride, sin_stride, PIECES, False, dtype)
    return x


@triton.jit
def _store_unrotated(
    ptr, rows, stride, x, inside, pos, cos_ptr, sin_ptr, cos_stride, sin_stride,
    PIECES: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    if ROPE:
        x = rotate_head(x, pos, cos_ptr, sin_ptr, cos_stride, sin_stride, PIECES, True, tl.float32)
    store_head(ptr, rows, stride, x, inside, PIECES)


@triton.jit
def _log_sums(lse_ptr, rows, inside):
    """lse in base 2; +inf, whose probabilities are zero, for a row outside or without a key."""
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E


@triton.jit
def _deltas(
    dout, out_ptr, dlse_ptr, rows, inside, out_stride, ROWS: tl.constexpr, PIECES: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    out = load_head(out_ptr, rows, out_stride, PIECES)
    delta = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), axis=1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=inside, other=0.0)
    return delta


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, cos_ptr, sin_ptr, seed_ptr, bias_ptr, key, row, start,
    length, left, right, scale, threshold, keep_scale, head, k_stride, v_stride, cos_stride,
    sin_stride, bias_stride, radius, QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr,
    ROTATE: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one query tile from one block of keys."""
    rows = tl.arange(0, BLOCK_N)
    keys = key + rows
    if MASKED:
        rows = tl.minimum(rows, length - 1 - key)
    k = _load_rotated(
        k_ptr + wide(key) * k_stride, rows, k_stride, key + rows, cos_ptr, sin_ptr, cos_stride,
        sin_stride, QK_PIECES, ROTATE,
    )  # fmt: skip
    v = load_head(v_ptr + wide(key) * v_stride, rows, v_stride, V_PIECES)
    s = dot_heads(q, k, BLOCK_M, BLOCK_N, len(QK_PIECES), PRECISION)
    distance = keys[None, :] - row[:, None]
    if WINDOWED:
        seen = in_window(row[:, None], keys[None, :], length, left, right)
    else:
        seen = keys[None, :] < length
    s = masked_scores(s, distance, seen, bias_ptr, radius, bias_stride, scale, BIAS, RAW, MASKED)
    p = powers(s, lse[:, None], scale, RAW)
    dp = dot_heads(dout, v, BLOCK_M, BLOCK_N, len(V_PIECES), PRECISION)
    if DROPOUT:
        keep = keep_mask(seed_ptr, threshold, start + row, key, head, BLOCK_M, BLOCK_N, False)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return accumulate(dq, cast(ds, k_ptr.dtype.element_ty), k, len(QK_PIECES), PRECISION)


@triton.jit
def _dq_tile(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, cos_ptr,
    sin_ptr, seed_ptr, bias_ptr, start, length, first, head, left, right, scale, threshold,
    keep_scale, q_stride, k_stride, v_stride, out_stride, dout_stride, dq_stride, cos_stride,
    sin_stride, bias_stride, radius, QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr,
    ROPE: tl.constexpr, ROTATE: tl.constexpr, WINDOWED: tl.constexpr, PEEL: tl.constexpr,
    HAS_DLSE: tl.constexpr, STORE_DELTA: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr,
    RAW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq (and delta) of the queries [first, first + BLOCK_M). Pointers: a sequence's first row."""
    step = tl.arange(0, BLOCK_M)
    row = first + step
    rows = tl.minimum(step, length - 1 - first)
    tile = wide(first)
    inside = row < length
    q = _load_rotated(
        q_ptr + tile * q_stride, rows, q_stride, first + rows, cos_ptr, sin_ptr, cos_stride,
        sin_stride, QK_PIECES, ROTATE,
    )  # fmt: skip
    dout = load_head(dout_ptr + tile * dout_stride, rows, dout_stride, V_PIECES)
    delta = _deltas(
        dout, out_ptr + tile * out_stride, dlse_ptr + first if HAS_DLSE else None, rows, inside,
        out_stride, BLOCK_M, V_PIECES, HAS_DLSE,
    )  # fmt: skip
    if STORE_DELTA:
        tl.store(delta_ptr + row, delta, mask=inside)
    lse = _log_sums(lse_ptr, row, inside)
    base_scale = scale * LOG2_E
    dq = zero_head(BLOCK_M, QK_PIECES)
    low = 0
    high = length
    if WINDOWED:
        low = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        high = tl.minimum(first + BLOCK_M + right, length)
    if PEEL:
        high = length // BLOCK_N * BLOCK_N
    for key in range(low, high, BLOCK_N):
        dq = _dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, cos_ptr, sin_ptr, seed_ptr, bias_ptr, key, row,
            start, length, left, right, base_scale, threshold, keep_scale, head, k_stride, v_stride,
            cos_stride, sin_stride, bias_stride, radius, QK_PIECES, V_PIECES, ROTATE, not PEEL,
            WINDOWED, DROPOUT, BIAS, RAW, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if PEEL and high < length:
        dq = _dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, cos_ptr, sin_ptr, seed_ptr, bias_ptr, high, row,
            start, length, left, right, base_scale, threshold, keep_scale, head, k_stride, v_stride,
            cos_stride, sin_stride, bias_stride, radius, QK_PIECES, V_PIECES, ROTATE, True,
            WINDOWED, DROPOUT, BIAS, RAW, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    _store_unrotated(
        dq_ptr + tile * dq_stride, step, dq_stride, scale_head(dq, scale, QK_PIECES), inside,
        first + rows, cos_ptr, sin_ptr, cos_stride, sin_stride, QK_PIECES, ROPE,
    )  # fmt: skip


@triton.jit
def _dkv_tile(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dk_ptr, dv_ptr, cos_ptr,
    sin_ptr, seed_ptr, bias_ptr, start, length, first, head, left, right, scale, threshold,
    keep_scale, q_stride, k_stride, v_stride, out_stride, dout_stride, dk_stride, dv_stride,
    cos_stride, sin_stride, bias_stride, radius, QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr,
    ROPE: tl.constexpr, ROTATE: tl.constexpr, WINDOWED: tl.constexpr, HAS_DLSE: tl.constexpr,
    STORED_DELTA: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys [first, first + BLOCK_M), from blocks of BLOCK_N queries."""
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    step = tl.arange(0, BLOCK_M)
    keys = first + step
    rows = tl.minimum(step, length - 1 - first)
    tile = wide(first)
    k = _load_rotated(
        k_ptr + tile * k_stride, rows, k_stride, first + rows, cos_ptr, sin_ptr, cos_stride,
        sin_stride, QK_PIECES, ROTATE,
    )  # fmt: skip
    v = load_head(v_ptr + tile * v_stride, rows, v_stride, V_PIECES)
    base_scale = scale * LOG2_E
    low = 0
    high = length
    if WINDOWED:
        low = tl.maximum(first - right, 0) // BLOCK_N * BLOCK_N
        high = tl.minimum(first + BLOCK_M + left, length)
    dk = zero_head(BLOCK_M, QK_PIECES)
    dv = zero_head(BLOCK_M, V_PIECES)
    for query in range(low, high, BLOCK_N):
        step_q = tl.arange(0, BLOCK_N)
        row = query + step_q
        inside = row < length
        rows_q = tl.minimum(step_q, length - 1 - query)
        base = wide(query)
        q = _load_rotated(
            q_ptr + base * q_stride, rows_q, q_stride, query + rows_q, cos_ptr, sin_ptr,
            cos_stride, sin_stride, QK_PIECES, ROTATE,
        )  # fmt: skip
        dout = load_head(dout_ptr + base * dout_stride, rows_q, dout_stride, V_PIECES)
        lse = _log_sums(lse_ptr, row, inside)
        if STORED_DELTA:
            delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        else:
            delta = _deltas(
                dout, out_ptr + base * out_stride, dlse_ptr + query if HAS_DLSE else None, rows_q,
                inside, out_stride, BLOCK_N, V_PIECES, HAS_DLSE,
            )  # fmt: skip
        s = dot_heads(k, q, BLOCK_M, BLOCK_N, len(QK_PIECES), PRECISION)
        distance = keys[:, None] - row[None, :]
        seen = keys[:, None] < length
        if WINDOWED:
            seen = in_window(row[None, :], keys[:, None], length, left, right)
        s = masked_scores(
            s, distance, seen, bias_ptr, radius, bias_stride, base_scale, BIAS, RAW, WINDOWED
        )
        p = powers(s, lse[None, :], base_scale, RAW)
        dp = dot_heads(v, dout, BLOCK_M, BLOCK_N, len(V_PIECES), PRECISION)
        kept = p
        if DROPOUT:
            keep = keep_mask(seed_ptr, threshold, start + row, first, head, BLOCK_N, BLOCK_M, True)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = accumulate(dv, cast(kept, dtype), dout, len(V_PIECES), PRECISION)
        ds = p * (dp - delta[None, :])
        dk = accumulate(dk, cast(ds, dtype), q, len(QK_PIECES), PRECISION)
    inside = keys < length
    store_head(
        dv_ptr + tile * dv_stride, step, dv_stride, scale_head(dv, keep_scale, V_PIECES), inside,
        V_PIECES,
    )  # fmt: skip
    _store_unrotated(
        dk_ptr + tile * dk_stride, step, dk_stride, scale_head(dk, scale, QK_PIECES), inside,
        first + rows, cos_ptr, sin_ptr, cos_stride, sin_stride, QK_PIECES, ROPE,
    )  # fmt: skip


# The kernels: which parts of which tile.


@triton.jit(do_not_specialize=["slots", "total_tokens", "left", "right", "threshold"])
def backward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    tiles_ptr, cos_ptr, sin_ptr, seed_ptr, bias_ptr, slots, total_tokens, heads, left, right,
    scale, threshold, keep_scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
    v_stride_h, out_stride_t, out_stride_h, dout_stride_t, dout_stride_h, dq_stride_t, dq_stride_h,
    dk_stride_t, dk_stride_h, dv_stride_t, dv_stride_h, cos_stride, sin_stride, bias_stride_h,
    bias_stride_d, radius, PART: tl.constexpr, QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr,
    ROPE: tl.constexpr, ROTATE: tl.constexpr, WINDOWED: tl.constexpr, PEEL: tl.constexpr,
    HAS_DLSE: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """PART "dq" and "dkv": tiles from the tile list. PART "both": the windowed form."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    if PART == "both":
        start, length, first, _ = locate(slot, tiles_ptr, slots, BLOCK_M)
    else:
        start, length, first = tile_of(tiles_ptr, slot, slots)
    if first >= length:
        return
    row = wide(start)
    h = wide(head)
    q_ptr += row * q_stride_t + h * q_stride_h
    k_ptr += row * k_stride_t + h * k_stride_h
    v_ptr += row * v_stride_t + h * v_stride_h
    dout_ptr += row * dout_stride_t + h * dout_stride_h
    lse_ptr += h * total_tokens + start
    if HAS_DLSE:
        dlse_ptr += h * total_tokens + start
    if PART != "both":
        delta_ptr += h * total_tokens + start
    if PART != "dkv":
        out_ptr += row * out_stride_t + h * out_stride_h
        dq_ptr += row * dq_stride_t + h * dq_stride_h
    if BIAS:
        bias_ptr += head * bias_stride_h
    if PART != "dkv":
        _dq_tile(
            q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, cos_ptr,
            sin_ptr, seed_ptr, bias_ptr, start, length, first, head, left, right, scale, threshold,
            keep_scale, q_stride_t, k_stride_t, v_stride_t, out_stride_t, dout_stride_t,
            dq_stride_t, cos_stride, sin_stride, bias_stride_d, radius, QK_PIECES, V_PIECES, ROPE,
            ROTATE, WINDOWED, PEEL, HAS_DLSE, PART == "dq", DROPOUT, BIAS, RAW, PRECISION,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if PART != "dq":
        dk_ptr += row * dk_stride_t + h * dk_stride_h
        dv_ptr += row * dv_stride_t + h * dv_stride_h
        _dkv_tile(
            q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dk_ptr, dv_ptr,
            cos_ptr, sin_ptr, seed_ptr, bias_ptr, start, length, first, head, left, right, scale,
            threshold, keep_scale, q_stride_t, k_stride_t, v_stride_t, out_stride_t, dout_stride_t,
            dk_stride_t, dv_stride_t, cos_stride, sin_stride, bias_stride_d, radius, QK_PIECES,
            V_PIECES, ROPE, ROTATE, WINDOWED, HAS_DLSE, PART == "dkv", DROPOUT, BIAS, RAW,
            PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
