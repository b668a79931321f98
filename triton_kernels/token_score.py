"""Scores of words against labels; fastenc/ops/token_score.py says what is computed.

Forward: a program owns BLOCK_M pairs of a word and a label. It makes their hidden rows BLOCK_R
columns at a time, as one product with the weight whose left operand is made in registers, and adds
them to the three outputs at once: nothing of size (words, C, R) is in memory.
FLOPs: 2 R D a pair (matrix units); bytes: R + D a word and a label, R D for the weight, from L2.
Backward: see token_score_bwd.

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  factors from registers into wgmma, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import cast, precision, wide
from fastenc.triton_kernels._tokens import (
    Launch,
    hidden_tile,
    pair_launches,
    sequence_of,
    tile_pairs,
)
from fastenc.triton_kernels.token_score_bwd import backward


@triton.jit(do_not_specialize=["pairs", "threshold"])
def scores_forward_kernel(
    token_ptr, label_ptr, s_ptr, t_ptr, weight_ptr, outs_ptr, bias_ptr, seq_ptr, seed_ptr, out_ptr,
    pairs, num_labels, size, factors, threshold, keep_scale, token_stride, label_stride_n,
    label_stride_c, s_stride, t_stride_n, t_stride_c, weight_stride, outs_stride, bias_stride,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = wide(tl.program_id(0)) * BLOCK_M
    word, label, seq, exists = tile_pairs(seq_ptr, first, pairs, num_labels, BLOCK_M)
    s_rows = s_ptr + wide(word)[:, None] * s_stride
    t_rows = t_ptr + (wide(seq) * t_stride_n + wide(label) * t_stride_c)[:, None]
    begin = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.zeros((BLOCK_M,), tl.float32)
    inner = tl.zeros((BLOCK_M,), tl.float32)
    for column in range(0, size, BLOCK_R):
        rows = hidden_tile(
            token_ptr, label_ptr, s_rows, t_rows, weight_ptr, seed_ptr, threshold, word, label, seq,
            exists, column, size, factors, token_stride, label_stride_n, label_stride_c,
            weight_stride, DROPOUT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        col = column + tl.arange(0, BLOCK_R)
        inside = col < size
        v = tl.load(outs_ptr + col, mask=inside, other=0.0).to(tl.float32)
        begin += tl.sum(rows * v[None, :], axis=1)
        v = tl.load(outs_ptr + outs_stride + col, mask=inside, other=0.0).to(tl.float32)
        end += tl.sum(rows * v[None, :], axis=1)
        v = tl.load(outs_ptr + 2 * outs_stride + col, mask=inside, other=0.0).to(tl.float32)
        inner += tl.sum(rows * v[None, :], axis=1)
    if DROPOUT:
        begin, end, inner = begin * keep_scale, end * keep_scale, inner * keep_scale
    if BIAS:
        begin += tl.load(bias_ptr).to(tl.float32)
        end += tl.load(bias_ptr + bias_stride).to(tl.float32)
        inner += tl.load(bias_ptr + 2 * bias_stride).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    place = out_ptr + 3 * (first + tl.arange(0, BLOCK_M))
    tl.store(place, cast(begin, dtype), mask=exists)
    tl.store(place + 1, cast(end, dtype), mask=exists)
    tl.store(place + 2, cast(inner, dtype), mask=exists)


def token_score_fwd(
    token: Tensor, label: Tensor, token_factor: Tensor, label_factor: Tensor, weight: Tensor,
    out_weight: Tensor, cu_words: Tensor, out_bias: Tensor | None, dropout_p: float,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    words, size = token.shape
    num_labels, factors = label_factor.shape[1:]
    dtype, device = token.dtype, token.device
    out = _common.empty((words, num_labels, 3), dtype, device)
    if out.numel() == 0:
        return out
    rows = (token, label, token_factor, label_factor, weight, out_weight)
    token, label, s, t, weight, outs = (_common.unit_rows(x) for x in rows)
    sequences = sequence_of(words, cu_words)
    pairs = words * num_labels
    chip = _common.chip_of(device)

    def run(launch: Launch) -> None:
        _common.launch(
            scores_forward_kernel, (triton.cdiv(pairs, launch.block_m),), token, label, s, t,
            weight, outs, out_bias, sequences, seed, out, pairs, num_labels, size, factors,
            int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p), token.stride(0), *label.stride()[:2],
            s.stride(0), *t.stride()[:2], weight.stride(0), outs.stride(0),
            0 if out_bias is None else out_bias.stride(0), BIAS=out_bias is not None,
            DROPOUT=dropout_p > 0, PRECISION=precision(dtype), **launch.constants(),
        )  # fmt: skip

    key = ("token_score_fwd", size, factors, dtype, dropout_p > 0, chip.name)
    _common.run_chosen(key, device, pair_launches(dtype, chip), run)
    return out


def token_score_bwd(
    grad: Tensor, token: Tensor, label: Tensor, token_factor: Tensor, label_factor: Tensor,
    weight: Tensor, out_weight: Tensor, cu_words: Tensor, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = (token, label, token_factor, label_factor, weight, out_weight)
    return backward(grad, tensors, cu_words, dropout_p, seed)
