"""Disentangled attention of packed sequences: content, content-to-position, position-to-content.

Forward: a program owns BLOCK_M query rows of one (sequence, head), from the tile list of global
attention, and walks the keys in blocks; :mod:`_disentangled` says how a block's position terms
come from the rows of the tables in its reach, so that nothing of size (L, L) or (L, 2 buckets) is
in memory. FLOPs a query-key pair: 4 head_dim for content and values, 4 head_dim a term (a band is
twice as wide as its block). Backward: see disentangled_attention_bwd.

Ladder (compiled for sm_90, bf16, head_dim 64; has not run on a GPU, so no time is claimed):
    v1  64 x 64 tiles, bands by wgmma, picked through shared memory: 176 bytes of spills forward,
        432 to 1200 backward.
    v2  32 x 32 tiles, every band on its side (64 rows for wgmma), nothing hoisted out of loops
        (the addresses of the picks filled the registers), one table a launch backward: no spills.
"""

from __future__ import annotations

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
    tile_of,
    zero_head,
)
from fastenc.triton_kernels._common import LOG2_E, cast, wide
from fastenc.triton_kernels._disentangled import band_rows, column_term, row_term
from fastenc.triton_kernels.disentangled_attention_bwd import backward
from fastenc.triton_kernels.disentangled_attention_launch import Call, Launch
from fastenc.triton_kernels.varlen_attention_fwd import finish


@triton.jit(do_not_specialize=["slots", "total_tokens", "threshold"])
def disentangled_forward_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pq_ptr, index_ptr, out_ptr, lse_ptr, tiles_ptr, seed_ptr, slots,
    total_tokens, heads, radius, scale, threshold, keep_scale, q_stride_t, q_stride_h, k_stride_t,
    k_stride_h, v_stride_t, v_stride_h, pk_stride_h, pk_stride_r, pq_stride_h, pq_stride_r,
    out_stride_t, out_stride_h, PIECES: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    start, length, first = tile_of(tiles_ptr, tl.program_id(0) // heads, slots)
    if first >= length:
        return
    h = wide(head)
    step = tl.arange(0, BLOCK_M)
    row = first + step
    rows = tl.minimum(step, length - 1 - first)
    q_ptr += wide(start + first) * q_stride_t + h * q_stride_h
    q = load_head(q_ptr, rows, q_stride_t, PIECES)
    k_ptr += wide(start) * k_stride_t + h * k_stride_h
    v_ptr += wide(start) * v_stride_t + h * v_stride_h
    if C2P:
        pk_ptr += h * pk_stride_h
    if P2C:
        pq_ptr += h * pq_stride_h
    scale = scale * LOG2_E
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_head(BLOCK_M, PIECES)
    for key in tl.range(0, length, BLOCK_N, disable_licm=True):
        step_n = tl.arange(0, BLOCK_N)
        keys = tl.minimum(step_n, length - 1 - key)
        k = load_head(k_ptr + wide(key) * k_stride_t, keys, k_stride_t, PIECES)
        s = dot_heads(q, k, BLOCK_M, BLOCK_N, len(PIECES), PRECISION)
        reach = band_rows(index_ptr, radius, first - key, 1, BLOCK_N, BAND)
        if C2P:
            s = row_term(
                s, q, pk_ptr, reach, pk_stride_r, PIECES, PRECISION, BLOCK_M, BLOCK_N, BAND
            )  # fmt: skip
        if P2C:
            s = column_term(
                s, k, pq_ptr, reach, pq_stride_r, PIECES, PRECISION, BLOCK_M, BLOCK_N, BAND
            )  # fmt: skip
        s = tl.where((key + step_n)[None, :] < length, s * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(top - higher)
        norm = norm * fade + tl.sum(p, axis=1)
        acc = scale_head(acc, fade[:, None], PIECES)
        if DROPOUT:
            keep = keep_mask(seed_ptr, threshold, start + row, key, head, BLOCK_M, BLOCK_N, False)
            p = tl.where(keep, p, 0.0)
        v = load_head(v_ptr + wide(key) * v_stride_t, keys, v_stride_t, PIECES)
        acc = accumulate(acc, cast(p, v_ptr.dtype.element_ty), v, len(PIECES), PRECISION)
        top = higher
    out_ptr += wide(start + first) * out_stride_t + h * out_stride_h
    lse_ptr += h * total_tokens + start + first
    finish(out_ptr, lse_ptr, top, norm, acc, step, row < length, keep_scale, out_stride_t, PIECES)


def disentangled_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None, pos_query: Tensor | None,
    rel_index: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = Call.of(q, k, v, pos_key, pos_query, rel_index, cu_seqlens, scale, dropout_p, seed)
    out = _common.empty(q.shape, q.dtype, q.device)
    lse = _common.empty((q.shape[1], q.shape[0]), q.new_empty(0).float().dtype, q.device)
    if q.numel() == 0:
        return out, lse

    def run(launch: Launch) -> None:
        tiles = schedule(call.cu_seqlens, call.total, launch.block_m)
        _common.launch(
            disentangled_forward_kernel, (tiles.shape[1] * call.heads,), *call.inputs,
            call.rel_index, out, lse, tiles, call.seed, tiles.shape[1], *call.scalars,
            *call.strides, *out.stride()[:2], **call.flags, **launch.constants(),
        )  # fmt: skip

    _common.run_chosen(call.key("fwd"), q.device, choose.forward(call.need, call.chip), run)
    return out, lse


def disentangled_attention_bwd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor | None,
    pos_query: Tensor | None, out: Tensor, lse: Tensor, rel_index: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = Call.of(q, k, v, pos_key, pos_query, rel_index, cu_seqlens, scale, dropout_p, seed)
    return backward(call, grad_out, out, lse, max_seqlen)
