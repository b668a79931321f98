"""Forward of packed attention in a narrow window: single-pass softmax, no running maximum.

A program owns BLOCK_M query rows of one (sequence, head). The keys that any of them can see span
BLOCK_M + left + right columns (192 for 64 rows at +-64), cut into NUM_BLOCKS blocks whose scores
all stay in registers, so the maximum is known before the first exponential and nothing is
rescaled. Where a block lies in the window is known at compile time: only edge blocks are masked.
The grid is linear in tokens; a program finds its sequence in cu_seqlens, with no list of tiles.
With ROPE, q and k are rotated as they are loaded. Bytes a token-head: 8 head_dim in bf16.

Ladder (compiled for sm_90, bf16, head_dim 64; has not run on a GPU, so no time is claimed):
    v1  three 64-key blocks in registers, wgmma, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastenc.triton_kernels._attention import (
    accumulate,
    dot_heads,
    keep_mask,
    load_head,
    rotate_head,
    zero_head,
)
from fastenc.triton_kernels._common import LOG2_E, cast, locate, wide
from fastenc.triton_kernels.varlen_attention_fwd import finish, masked_scores, powers, row_peaks


@triton.jit
def window_mask(
    first, length, OFFSET: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which of the keys from OFFSET on (relative to the tile) are seen: checks what can fail."""
    i = tl.arange(0, BLOCK_M)[:, None]
    j = OFFSET + tl.arange(0, BLOCK_N)[None, :]
    seen = tl.full((BLOCK_M, BLOCK_N), True, tl.int1)
    if OFFSET < BLOCK_M - 1 - LEFT or OFFSET < 0:
        seen = seen & (j >= tl.maximum(i - LEFT, -first))
    if OFFSET + BLOCK_N - 1 > RIGHT or OFFSET + BLOCK_N - 1 > 0:
        seen = seen & (j <= tl.minimum(i + RIGHT, length - 1 - first))
    return seen


@triton.jit(do_not_specialize=["num_seqs", "total_tokens", "threshold"])
def windowed_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_ptr, cos_ptr, sin_ptr, seed_ptr,
    num_seqs, total_tokens, heads, scale, threshold, keep_scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    out_stride_t, out_stride_h, cos_stride, sin_stride,
    QK_PIECES: tl.constexpr, V_PIECES: tl.constexpr, ROPE: tl.constexpr,
    DROPOUT: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOW: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    start, length, first, _ = locate(tl.program_id(0) // heads, cu_ptr, num_seqs, BLOCK_M)
    if first >= length:
        return
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    step = tl.arange(0, BLOCK_M)
    rows = tl.minimum(step, length - 1 - first)
    tile = wide(start + first)
    q = load_head(q_ptr + tile * q_stride_t + wide(head) * q_stride_h, rows, q_stride_t, QK_PIECES)
    if ROPE:
        q = rotate_head(
            q, first + rows, cos_ptr, sin_ptr, cos_stride, sin_stride, QK_PIECES, False, dtype
        )
    k_ptr += tile * k_stride_t + wide(head) * k_stride_h
    v_ptr += tile * v_stride_t + wide(head) * v_stride_h
    scale = scale * LOG2_E
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    scores = ()
    for block in tl.static_range(NUM_BLOCKS):
        step_n = LOW + block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = tl.minimum(tl.maximum(step_n, -first), length - 1 - first)
        k = load_head(k_ptr, keys, k_stride_t, QK_PIECES)
        if ROPE:
            k = rotate_head(
                k, first + keys, cos_ptr, sin_ptr, cos_stride, sin_stride, QK_PIECES, False, dtype
            )
        s = dot_heads(q, k, BLOCK_M, BLOCK_N, len(QK_PIECES), PRECISION)
        seen = window_mask(
            first, length, LOW + block * BLOCK_N, LEFT, RIGHT, BLOCK_M, BLOCK_N
        )  # fmt: skip
        s = masked_scores(s, None, seen, None, None, None, scale, False, RAW, True)
        top = tl.maximum(top, row_peaks(s, scale, RAW))
        scores += (s,)
    base = tl.where(top == float("-inf"), 0.0, top)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_head(BLOCK_M, V_PIECES)
    for block in tl.static_range(NUM_BLOCKS):
        step_n = LOW + block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = tl.minimum(tl.maximum(step_n, -first), length - 1 - first)
        p = powers(scores[block], base[:, None], scale, RAW)
        norm += tl.sum(p, axis=1)
        if DROPOUT:
            row = start + first + step
            key = first + LOW + block * BLOCK_N
            keep = keep_mask(seed_ptr, threshold, row, key, head, BLOCK_M, BLOCK_N, False)
            p = tl.where(keep, p, 0.0)
        v = load_head(v_ptr, keys, v_stride_t, V_PIECES)
        acc = accumulate(acc, cast(p, dtype), v, len(V_PIECES), PRECISION)
    out_ptr += tile * out_stride_t + wide(head) * out_stride_h
    lse_ptr += wide(head) * total_tokens + start + first
    inside = first + step < length
    finish(out_ptr, lse_ptr, top, norm, acc, step, inside, keep_scale, out_stride_t, V_PIECES)
