"""Backward of disentangled attention, without atomics: every sum has one order.

dq by query tiles (with delta), dk and dv by key tiles: both walk the other side in blocks and add
the position terms through the band of each block. The tables' gradients come from a third kernel:
for a fixed offset between a query tile and a key block the band is the same, so a program owns one
(offset, head, chunk of tiles), adds the bands' gradients in registers and writes one partial; a
fourth kernel adds the partials whose places stand for one table row. Offsets past the radius, where
every distance is clamped, share a program on each side. Each table has a launch of its own, both in
one do not fit the registers; with two tables the scores are made four times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels import disentangled_attention_launch as choose
from fastenc.triton_kernels._attention import (
    accumulate,
    dot_heads,
    keep_mask,
    load_head,
    scale_head,
    schedule,
    store_head,
    tile_of,
    zero_head,
)
from fastenc.triton_kernels._common import LOG2_E, cast, dot, wide
from fastenc.triton_kernels._disentangled import (
    add_row_gradient,
    add_table_gradient,
    band_rows,
    column_band,
    column_term,
    row_band,
    row_term,
)
from fastenc.triton_kernels.disentangled_attention_launch import Call, Launch


@triton.jit
def _probabilities(
    x, y, x_table, y_table, reach, x_table_stride, y_table_stride, lse, seen, scale,
    PIECES: tl.constexpr, X_TERM: tl.constexpr, Y_TERM: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """P of a tile, rows ``x`` and columns ``y``; ``lse`` (base 2) broadcasts over it."""
    s = dot_heads(x, y, ROWS, COLS, len(PIECES), PRECISION)
    if X_TERM:
        s = row_term(s, x, x_table, reach, x_table_stride, PIECES, PRECISION, ROWS, COLS, BAND)
    if Y_TERM:
        s = column_term(s, y, y_table, reach, y_table_stride, PIECES, PRECISION, ROWS, COLS, BAND)
    return tl.where(seen, tl.exp2(s * scale - lse), 0.0)


@triton.jit(do_not_specialize=["slots", "total_tokens", "threshold"])
def disentangled_dq_backward_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, index_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    tiles_ptr, seed_ptr, slots, total_tokens, heads, radius, scale, threshold, keep_scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, pk_stride_h,
    pk_stride_r, pq_stride_h, pq_stride_r, out_stride_t, out_stride_h, dout_stride_t,
    dout_stride_h, dq_stride_t, dq_stride_h, PIECES: tl.constexpr, C2P: tl.constexpr,
    P2C: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    start, length, first = tile_of(tiles_ptr, tl.program_id(0) // heads, slots)
    if first >= length:
        return
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    h = wide(head)
    step = tl.arange(0, BLOCK_M)
    row = first + step
    rows = tl.minimum(step, length - 1 - first)
    tile = wide(start + first)
    q = load_head(q_ptr + tile * q_stride_t + h * q_stride_h, rows, q_stride_t, PIECES)
    dout_ptr += tile * dout_stride_t + h * dout_stride_h
    dout = load_head(dout_ptr, rows, dout_stride_t, PIECES)
    out = load_head(out_ptr + tile * out_stride_t + h * out_stride_h, rows, out_stride_t, PIECES)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), axis=1)
    stats = h * total_tokens + start + first
    tl.store(delta_ptr + stats + step, delta, mask=row < length)
    lse = tl.load(lse_ptr + stats + rows) * LOG2_E
    k_ptr += wide(start) * k_stride_t + h * k_stride_h
    v_ptr += wide(start) * v_stride_t + h * v_stride_h
    if C2P:
        pk_ptr += h * pk_stride_h
    if P2C:
        pq_ptr += h * pq_stride_h
    base_scale = scale * LOG2_E
    dq = zero_head(BLOCK_M, PIECES)
    for key in tl.range(0, length, BLOCK_N, disable_licm=True):
        step_n = tl.arange(0, BLOCK_N)
        keys = tl.minimum(step_n, length - 1 - key)
        k = load_head(k_ptr + wide(key) * k_stride_t, keys, k_stride_t, PIECES)
        v = load_head(v_ptr + wide(key) * v_stride_t, keys, v_stride_t, PIECES)
        reach = band_rows(index_ptr, radius, first - key, 1, BLOCK_N, BAND)
        p = _probabilities(
            q, k, pk_ptr, pq_ptr, reach, pk_stride_r, pq_stride_r, lse[:, None],
            (key + step_n)[None, :] < length, base_scale, PIECES, C2P, P2C, PRECISION, BLOCK_M,
            BLOCK_N, BAND,
        )  # fmt: skip
        dp = dot_heads(dout, v, BLOCK_M, BLOCK_N, len(PIECES), PRECISION)
        if DROPOUT:
            keep = keep_mask(seed_ptr, threshold, start + row, key, head, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = accumulate(dq, cast(ds, dtype), k, len(PIECES), PRECISION)
        if C2P:
            band = cast(row_band(ds, BLOCK_M, BLOCK_N, BAND), dtype)
            dq = add_row_gradient(dq, band, pk_ptr, reach, pk_stride_r, PIECES, PRECISION)
    dq_ptr += tile * dq_stride_t + h * dq_stride_h
    store_head(dq_ptr, step, dq_stride_t, scale_head(dq, scale, PIECES), row < length, PIECES)


@triton.jit(do_not_specialize=["slots", "total_tokens", "threshold"])
def disentangled_dkv_backward_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, index_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    tiles_ptr, seed_ptr, slots, total_tokens, heads, radius, scale, threshold, keep_scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, pk_stride_h,
    pk_stride_r, pq_stride_h, pq_stride_r, dout_stride_t, dout_stride_h, dk_stride_t, dk_stride_h,
    dv_stride_t, dv_stride_h, PIECES: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """Rows are keys here, columns queries."""
    head = tl.program_id(0) % heads
    start, length, first = tile_of(tiles_ptr, tl.program_id(0) // heads, slots)
    if first >= length:
        return
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    h = wide(head)
    step = tl.arange(0, BLOCK_M)
    rows = tl.minimum(step, length - 1 - first)
    tile = wide(start + first)
    k = load_head(k_ptr + tile * k_stride_t + h * k_stride_h, rows, k_stride_t, PIECES)
    v = load_head(v_ptr + tile * v_stride_t + h * v_stride_h, rows, v_stride_t, PIECES)
    q_ptr += wide(start) * q_stride_t + h * q_stride_h
    dout_ptr += wide(start) * dout_stride_t + h * dout_stride_h
    lse_ptr += h * total_tokens + start
    delta_ptr += h * total_tokens + start
    if C2P:
        pk_ptr += h * pk_stride_h
    if P2C:
        pq_ptr += h * pq_stride_h
    base_scale = scale * LOG2_E
    dk = zero_head(BLOCK_M, PIECES)
    dv = zero_head(BLOCK_M, PIECES)
    for query in tl.range(0, length, BLOCK_N, disable_licm=True):
        step_n = tl.arange(0, BLOCK_N)
        row = query + step_n
        inside = row < length
        there = tl.minimum(step_n, length - 1 - query)
        q = load_head(q_ptr + wide(query) * q_stride_t, there, q_stride_t, PIECES)
        dout = load_head(dout_ptr + wide(query) * dout_stride_t, there, dout_stride_t, PIECES)
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        reach = band_rows(index_ptr, radius, query - first, -1, BLOCK_N, BAND)
        p = _probabilities(
            k, q, pq_ptr, pk_ptr, reach, pq_stride_r, pk_stride_r, lse[None, :], inside[None, :],
            base_scale, PIECES, P2C, C2P, PRECISION, BLOCK_M, BLOCK_N, BAND,
        )  # fmt: skip
        dp = dot_heads(v, dout, BLOCK_M, BLOCK_N, len(PIECES), PRECISION)
        kept = p
        if DROPOUT:
            keep = keep_mask(seed_ptr, threshold, start + row, first, head, BLOCK_N, BLOCK_M, True)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = accumulate(dv, cast(kept, dtype), dout, len(PIECES), PRECISION)
        ds = p * (dp - delta[None, :])
        dk = accumulate(dk, cast(ds, dtype), q, len(PIECES), PRECISION)
        if P2C:
            band = cast(row_band(ds, BLOCK_M, BLOCK_N, BAND), dtype)
            dk = add_row_gradient(dk, band, pq_ptr, reach, pq_stride_r, PIECES, PRECISION)
    inside = first + step < length
    dk_ptr += tile * dk_stride_t + h * dk_stride_h
    dv_ptr += tile * dv_stride_t + h * dv_stride_h
    store_head(dk_ptr, step, dk_stride_t, scale_head(dk, scale, PIECES), inside, PIECES)
    store_head(dv_ptr, step, dv_stride_t, scale_head(dv, keep_scale, PIECES), inside, PIECES)


@triton.jit
def _store_partial(ptr, x, PIECES: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.arange(0, BAND)[:, None] * WIDTH
    for i in tl.static_range(len(PIECES)):
        col = PIECES[i][0] + tl.arange(0, PIECES[i][1])[None, :]
        tl.store(ptr + place + col, x[i])


@triton.jit(do_not_specialize=["slots", "total_tokens", "threshold", "chunks", "far"])
def disentangled_tables_partial_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, index_ptr, dout_ptr, lse_ptr, delta_ptr, partial_ptr,
    tiles_ptr, seed_ptr, chunks, far, slots, total_tokens, heads, radius, scale, threshold,
    keep_scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    pk_stride_h, pk_stride_r, pq_stride_h, pq_stride_r, dout_stride_t, dout_stride_h,
    PIECES: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
    WIDTH: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (kind, head, chunk): kind - far is the key block minus the query tile.

    The gradient of the table that content-to-position reads, or (OF_KEYS) of the other one.
    """
    kind = tl.program_id(0)
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    offset = kind - far
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    h = wide(head)
    step = tl.arange(0, BLOCK_M)
    if C2P:
        pk_ptr += h * pk_stride_h
    if P2C:
        pq_ptr += h * pq_stride_h
    base_scale = scale * LOG2_E
    dtable = zero_head(BAND, PIECES)
    for slot in tl.range(chunk, slots, chunks, disable_licm=True):
        start, length, first = tile_of(tiles_ptr, slot, slots)
        low = first + offset * BLOCK_M
        high = tl.where(low < 0, low, tl.minimum(low + BLOCK_N, length))
        if offset == -far:
            high = low + BLOCK_N
            low = tl.minimum(high, 0)
        if offset == far:
            high = length
        row = first + step
        rows = tl.maximum(tl.minimum(step, length - 1 - first), 0)
        tile = wide(start + first)
        q = load_head(q_ptr + tile * q_stride_t + h * q_stride_h, rows, q_stride_t, PIECES)
        dout_rows = dout_ptr + tile * dout_stride_t + h * dout_stride_h
        dout = load_head(dout_rows, rows, dout_stride_t, PIECES)
        stats = h * total_tokens + start + row
        lse = tl.load(lse_ptr + stats, mask=row < length, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + stats, mask=row < length, other=0.0)
        for key in tl.range(low, high, BLOCK_N, disable_licm=True):
            keys = key + step
            there = tl.minimum(step, length - 1 - key)
            block = wide(start + key)
            k = load_head(k_ptr + block * k_stride_t + h * k_stride_h, there, k_stride_t, PIECES)
            reach = band_rows(index_ptr, radius, first - key, 1, BLOCK_N, BAND)
            p = _probabilities(
                q, k, pk_ptr, pq_ptr, reach, pk_stride_r, pq_stride_r, lse[:, None],
                keys[None, :] < length, base_scale, PIECES, C2P, P2C, PRECISION, BLOCK_M, BLOCK_N,
                BAND,
            )  # fmt: skip
            v = load_head(v_ptr + block * v_stride_t + h * v_stride_h, there, v_stride_t, PIECES)
            dp = dot_heads(dout, v, BLOCK_M, BLOCK_N, len(PIECES), PRECISION)
            if DROPOUT:
                keep = keep_mask(
                    seed_ptr, threshold, start + row, key, head, BLOCK_M, BLOCK_N, False
                )
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if OF_KEYS:
                band = cast(column_band(ds, BLOCK_M, BLOCK_N, BAND), dtype)
                dtable = add_table_gradient(dtable, band, k, len(PIECES), PRECISION)
            else:
                band = tl.trans(cast(row_band(ds, BLOCK_M, BLOCK_N, BAND), dtype))
                dtable = add_table_gradient(dtable, band, q, len(PIECES), PRECISION)
    place = ((wide(chunk) * heads + head) * (2 * far + 1) + kind) * (BAND * WIDTH)
    _store_partial(partial_ptr + place, scale_head(dtable, scale, PIECES), PIECES, BAND, WIDTH)


@triton.jit(do_not_specialize=["chunks", "far"])
def disentangled_reduce_kernel(
    partial_ptr, index_ptr, dtable_ptr, chunks, far, heads, radius, table_rows, head_dim,
    BLOCK: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head's table: the places of every partial that stand for each of them."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    row = first + tl.arange(0, ROWS)
    step = tl.arange(0, BAND)
    col = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for kind in range(0, 2 * far + 1):
        reach = band_rows(index_ptr, radius, (far - kind) * BLOCK, 1, BLOCK, BAND)
        reach = tl.where(step < 2 * BLOCK - 1, reach, -1)
        if tl.max(((reach >= first) & (reach < first + ROWS)).to(tl.int32)) > 0:
            chosen = (row[:, None] == reach[None, :]).to(tl.float32)
            for chunk in range(0, chunks):
                place = ((wide(chunk) * heads + head) * (2 * far + 1) + kind) * (BAND * WIDTH)
                part = tl.load(partial_ptr + place + step[:, None] * WIDTH + col[None, :])
                total = dot(chosen, part, total, "ieee")
    ptrs = dtable_ptr + (wide(head) * table_rows + row[:, None]) * head_dim + col[None, :]
    stored = (row < table_rows)[:, None] & (col < head_dim)[None, :]
    tl.store(ptrs, cast(total, dtable_ptr.dtype.element_ty), mask=stored)


def _tables(call: Call, dout: Tensor, lse: Tensor, delta: Tensor, grads, max_seqlen: int) -> None:
    """The gradients of pos_key and pos_query into ``grads`` (None for an absent table)."""
    launch = choose.tables(call.need, call.chip)
    block, band = launch.block_m, launch.constants()["BAND"]
    past = triton.cdiv(call.radius + block - 1, block)
    far = max(min(past, triton.cdiv(max_seqlen, block)), 1)
    chunks = choose.chunks(call.heads, 2 * far + 1, call.chip)
    width = call.flags["PIECES"][0][1]
    device = call.q.device
    shape = chunks, call.heads, 2 * far + 1, band, width
    partial = _common.empty(shape, torch.float32, device)
    tiles = schedule(call.cu_seqlens, call.total, block)
    for of_keys, grad in enumerate(grads):
        if grad is None:
            continue
        _common.launch(
            disentangled_tables_partial_kernel, (2 * far + 1, call.heads, chunks), *call.inputs,
            call.rel_index, dout, lse, delta, partial, tiles, call.seed, chunks, far,
            tiles.shape[1], *call.scalars, *call.strides, *dout.stride()[:2], **call.flags,
            WIDTH=width, OF_KEYS=bool(of_keys), **launch.constants(),
        )  # fmt: skip
        _common.launch(
            disentangled_reduce_kernel, (triton.cdiv(grad.shape[1], 16), call.heads), partial,
            call.rel_index, grad, chunks, far, call.heads, call.radius, grad.shape[1],
            grad.shape[2], BLOCK=block, BAND=band, WIDTH=width, ROWS=16, num_warps=4,
        )  # fmt: skip


def backward(
    call: Call, dout: Tensor, out: Tensor, lse: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, device = call.q.dtype, call.q.device
    dq, dk, dv = (_common.empty(x.shape, dtype, device) for x in call.inputs[:3])
    tables = call.inputs[3:]
    grads = [None if x is None else _common.empty(x.shape, dtype, device) for x in tables]
    absent = _common.empty((0,), dtype, device)
    returned = tuple(absent if g is None else g for g in grads)
    if call.q.numel() == 0:
        return dq, dk, dv, *(x.zero_() for x in returned)
    dout, out, lse = _common.tile_rows(dout), _common.tile_rows(out), lse.contiguous()
    delta = _common.empty(lse.shape, torch.float32, device)

    def run(launch: Launch) -> None:
        tiles = schedule(call.cu_seqlens, call.total, launch.block_m)
        grid, slots = (tiles.shape[1] * call.heads,), tiles.shape[1]
        constants = {**call.flags, **launch.constants()}
        _common.launch(
            disentangled_dq_backward_kernel, grid, *call.inputs, call.rel_index, out, dout, lse,
            delta, dq, tiles, call.seed, slots, *call.scalars, *call.strides, *out.stride()[:2],
            *dout.stride()[:2], *dq.stride()[:2], **constants,
        )  # fmt: skip
        _common.launch(
            disentangled_dkv_backward_kernel, grid, *call.inputs, call.rel_index, dout, lse, delta,
            dk, dv, tiles, call.seed, slots, *call.scalars, *call.strides, *dout.stride()[:2],
            *dk.stride()[:2], *dv.stride()[:2], **constants,
        )  # fmt: skip

    _common.run_chosen(call.key("bwd"), device, choose.backward(call.need, call.chip), run)
    if any(g is not None for g in grads):
        _tables(call, dout, lse, delta, grads, max_seqlen)
    return dq, dk, dv, *returned
