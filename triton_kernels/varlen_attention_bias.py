"""Gradient of the distance table of packed attention, deterministic and without atomics.

dbias[h, clamp(j - i, -R, R) + R] = sum of dS_ij. For a fixed offset between a query tile and a key
block the distance depends only on the place in the tile, so a program owns one (block offset,
head, chunk of tiles), adds its dS tiles elementwise, and writes one (BLOCK, BLOCK) partial; a
second kernel adds the partials along their diagonals in a fixed order. Offsets at which every
distance is clamped share one program on each side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._attention import (
    dot_heads,
    in_window,
    keep_mask,
    load_head,
    tile_of,
)
from fastenc.triton_kernels._common import LOG2_E, cast, wide
from fastenc.triton_kernels.varlen_attention_bwd import _log_sums
from fastenc.triton_kernels.varlen_attention_fwd import masked_scores, powers

DISTANCES = 32  # inner distances a program of the second kernel


@triton.jit(do_not_specialize=["slots", "total_tokens", "left", "right", "threshold", "chunks"])
def bias_partial_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, partial_ptr, tiles_ptr, seed_ptr, bias_ptr,
    slots, total_tokens, heads, chunks, left, right, scale, threshold, keep_scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dout_stride_t, dout_stride_h, bias_stride_h, bias_stride_d, radius,
    FAR: tl.constexpr, PIECES: tl.constexpr, WINDOWED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (kind, head, chunk): kind - FAR is the key block minus the query block."""
    kind = tl.program_id(0)
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    offset = kind - FAR
    step = tl.arange(0, BLOCK)
    base_scale = scale * LOG2_E
    bias_ptr += head * bias_stride_h
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    for slot in range(chunk, slots, chunks):
        start, length, first = tile_of(tiles_ptr, slot, slots)
        low = first + offset * BLOCK
        high = tl.where(low < 0, low, tl.minimum(low + BLOCK, length))
        if offset == -FAR:
            high = low + BLOCK
            low = tl.minimum(high, 0)
        if offset == FAR:
            high = length
        row = first + step
        inside = row < length
        rows = tl.maximum(tl.minimum(step, length - 1 - first), 0)
        tile = wide(start + first)
        h = wide(head)
        q = load_head(q_ptr + tile * q_stride_t + h * q_stride_h, rows, q_stride_t, PIECES)
        dout_rows = dout_ptr + tile * dout_stride_t + h * dout_stride_h
        dout = load_head(dout_rows, rows, dout_stride_t, PIECES)
        lse = _log_sums(lse_ptr + h * total_tokens + start, row, inside)
        delta = tl.load(delta_ptr + h * total_tokens + start + row, mask=inside, other=0.0)
        for key in range(low, high, BLOCK):
            keys = key + step
            there = tl.minimum(step, length - 1 - key)
            block = wide(start + key)
            k = load_head(k_ptr + block * k_stride_t + h * k_stride_h, there, k_stride_t, PIECES)
            v = load_head(v_ptr + block * v_stride_t + h * v_stride_h, there, v_stride_t, PIECES)
            s = dot_heads(q, k, BLOCK, BLOCK, len(PIECES), PRECISION)
            distance = keys[None, :] - row[:, None]
            if WINDOWED:
                seen = in_window(row[:, None], keys[None, :], length, left, right)
            else:
                seen = keys[None, :] < length
            s = masked_scores(
                s, distance, seen, bias_ptr, radius, bias_stride_d, base_scale, True, False, True
            )
            p = powers(s, lse[:, None], base_scale, False)
            dp = dot_heads(dout, v, BLOCK, BLOCK, len(PIECES), PRECISION)
            if DROPOUT:
                keep = keep_mask(seed_ptr, threshold, start + row, key, head, BLOCK, BLOCK, False)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            accumulator += p * (dp - delta[:, None])
    place = ((wide(chunk) * heads + head) * (2 * FAR + 1) + kind) * (BLOCK * BLOCK)
    tl.store(partial_ptr + place + step[:, None] * BLOCK + step[None, :], accumulator)


@triton.jit(do_not_specialize=["chunks"])
def bias_reduce_kernel(
    partial_ptr, dbias_ptr, heads, chunks, radius, FAR: tl.constexpr, BLOCK: tl.constexpr,
    DISTANCES: tl.constexpr,
):  # fmt: skip
    """Programs (0, h) and (1, h) make the two clamped distances, the others inner ones."""
    which = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)[:, None]
    dbias_ptr += head * (2 * radius + 1)
    dtype: tl.constexpr = dbias_ptr.dtype.element_ty
    if which < 2:
        j = tl.arange(0, BLOCK)[None, :]
        ends = tl.zeros((BLOCK, BLOCK), tl.float32)
        for kind in range(0, 2 * FAR + 1):
            distance = (kind - FAR) * BLOCK + j - i
            counted = tl.where(which == 0, -distance, distance) >= radius
            for chunk in range(0, chunks):
                place = ((wide(chunk) * heads + head) * (2 * FAR + 1) + kind) * (BLOCK * BLOCK)
                ends += tl.load(partial_ptr + place + i * BLOCK + j, mask=counted, other=0.0)
        total = tl.sum(tl.sum(ends, axis=1), axis=0)
        tl.store(dbias_ptr + which * 2 * radius, cast(total, dtype))
    else:
        distance = (which - 2) * DISTANCES + 1 - radius + tl.arange(0, DISTANCES)
        inner = distance < radius
        sums = tl.zeros((BLOCK, DISTANCES), tl.float32)
        for kind in range(1, 2 * FAR):
            j = distance[None, :] - (kind - FAR) * BLOCK + i
            counted = (j >= 0) & (j < BLOCK) & inner[None, :]
            for chunk in range(0, chunks):
                place = ((wide(chunk) * heads + head) * (2 * FAR + 1) + kind) * (BLOCK * BLOCK)
                sums += tl.load(partial_ptr + place + i * BLOCK + j, mask=counted, other=0.0)
        result = cast(tl.sum(sums, axis=0), dtype)
        tl.store(dbias_ptr + distance + radius, result, mask=inner)


def bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, tiles: Tensor,
    reach: tuple[int, int], scalars: tuple, seed: Tensor | None, bias: Tensor, dbias: Tensor,
    block: int, num_warps: int, constants: dict,
) -> None:  # fmt: skip
    """``dbias`` (heads, 2 R + 1), contiguous, from tiles of ``block`` rows."""
    heads, radius = q.shape[1], (bias.shape[1] - 1) // 2
    slots = tiles.shape[1]
    far = triton.cdiv(radius + block - 1, block)
    chunks = min(slots, 16)
    partial = _common.empty(
        (chunks, heads, 2 * far + 1, block, block), torch.float32, q.device
    )  # fmt: skip
    strides = (s for x in (q, k, v, dout) for s in x.stride()[:2])
    _common.launch(
        bias_partial_kernel, (2 * far + 1, heads, chunks), q, k, v, dout, lse, delta, partial,
        tiles, seed, bias, slots, q.shape[0], heads, chunks, *reach, *scalars, *strides,
        *bias.stride(), radius, FAR=far, BLOCK=block, num_warps=num_warps, num_stages=1,
        **constants,
    )  # fmt: skip
    programs = 2 + triton.cdiv(2 * radius - 1, DISTANCES)
    _common.launch(
        bias_reduce_kernel, (programs, heads), partial, dbias, heads, chunks, radius,
        FAR=far, BLOCK=block, DISTANCES=DISTANCES, num_warps=4,
    )  # fmt: skip
