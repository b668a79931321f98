"""Disentangled attention of DeBERTa-v2 and v3 over packed sequences.

q, k, v (total_tokens, heads, head_dim), pos_key and pos_query (heads, 2 buckets, head_dim) or None,
cu_seqlens (num_seqs + 1,) -> (total_tokens, heads, head_dim):

    out_i = sum_j dropout(softmax_j(scale (q_i . k_j + q_i . pos_key[d] + k_j . pos_query[d]))) v_j

where d = bucket(i - j) + buckets. The bucket is odd: the distance itself up to buckets / 2, its
logarithm up to max_positions - 1, constant beyond; max_positions = 0: the distance itself, clamped.
He et al. 2020, arXiv:2006.03654; v3: arXiv:2111.09543. Softmax statistics in fp32; dropout's mask
is varlen_attention's. Neither (L, L) nor (L, 2 buckets) is ever whole in memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._disentangled_ref import backward_ref, forward_ref, relative_index
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import lower_precision, statistics_dtype
from fastenc.ops.varlen_attention import check_dropout


def _forward_fake(q, k, v, pos_key, pos_query, rel_index, cu_seqlens, max_seqlen, *options):
    stats = statistics_dtype(q)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=stats)


def _backward_fake(grad_out, q, k, v, pos_key, pos_query, *others):
    tables = (q.new_empty(0 if x is None else x.shape) for x in (pos_key, pos_query))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *tables


def _save(ctx, inputs, output):
    q, k, v, pos_key, pos_query, rel_index, cu_seqlens, *ctx.plain, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, pos_key, pos_query, *output, rel_index, cu_seqlens, seed)


def _differentiate(ctx, bwd, grad_out, _lse):
    if grad_out is None:
        return (None,) * 11
    *tensors, seed = ctx.saved_tensors
    dq, dk, dv, dpos_key, dpos_query = bwd(grad_out, *tensors, *ctx.plain, seed)
    dpos_key = None if tensors[3] is None else dpos_key
    dpos_query = None if tensors[4] is None else dpos_query
    return dq, dk, dv, dpos_key, dpos_query, *(None,) * 6


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query"
_SHAPE = "Tensor rel_index, Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p"

define(
    OpSpec(
        name="disentangled_attention",
        forward=f"({_INPUTS}, {_SHAPE}, Tensor? seed) -> (Tensor out, Tensor lse)",
        backward=f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_SHAPE}, Tensor? seed)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dpos_key, Tensor dpos_query)",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=forward_ref,
        backward_ref=backward_ref,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(5),
        cpu_refuses=_checks.cpu_head_dim,
        cuda_refuses=_checks.cuda_disentangled,
    )
)


@functools.lru_cache(maxsize=32)
def _kept_index(buckets: int, max_positions: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return relative_index(buckets, max_positions, device)


def _index_for(q: Tensor, buckets: int, max_positions: int) -> Tensor:
    eager = not torch.compiler.is_compiling() and type(q) in (Tensor, torch.nn.Parameter)
    return (_kept_index if eager else relative_index)(buckets, max_positions, q.device)


def _check_buckets(buckets: int, max_positions: int) -> None:
    for name, value in (("buckets", buckets), ("max_positions", max_positions)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if buckets < 1 or max_positions < 0:
        raise ValueError(
            f"expected buckets >= 1 and max_positions >= 0, got {buckets} and {max_positions}"
        )
    if max_positions > 0 and (buckets < 4 or buckets % 2 or max_positions - 1 <= buckets // 2):
        raise ValueError(
            "expected an even number of buckets >= 4 and max_positions > buckets / 2 + 1 "
            f"(or 0: no logarithm), got {buckets} and {max_positions}"
        )


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    buckets: int = 256,
    max_positions: int = 512,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Self-attention of packed sequences with DeBERTa's relative positions.

    Args:
        q, k, v: (total_tokens, heads, head_dim), one dtype, any strides.
        pos_key: (heads, 2 * buckets, head_dim), the key projection of the relative embeddings (the
            "c2p" term), or None. pos_query: the query projection ("p2c"), or None.
        cu_seqlens: (num_seqs + 1,) int32, 0 to total_tokens. max_seqlen: at least the longest.
        buckets, max_positions: transformers' position_buckets and max_relative_positions;
            max_positions = 0 takes distances as they are, clamped to ``buckets``.
        scale: of the scores, ``(head_dim * (1 + terms)) ** -0.5`` by default, ``terms`` counting
            the tables that are given.
        dropout_p: of the probabilities, in [0, 1); ``seed`` (an int, or one int64 on the device of
            q; drawn from torch's generator if None) fixes the mask, the same on every backend.

    Returns:
        (total_tokens, heads, head_dim), dtype of ``q``; the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, buckets or cu_seqlens do not fit.
    """
    _check_buckets(buckets, max_positions)
    _checks.floating("q", q, 3)
    if q.shape[2] < 1:
        raise ValueError(f"q: expected head_dim >= 1, got shape {tuple(q.shape)}")
    table = (q.shape[1], 2 * buckets, q.shape[2])
    for name, x, shape in (
        ("k", k, tuple(q.shape)),
        ("v", v, tuple(q.shape)),
        ("pos_key", pos_key, table),
        ("pos_query", pos_query, table),
    ):
        if x is None and name.startswith("pos"):
            continue
        _checks.floating(name, x, 3)
        _checks.same_dtype(name, x, "q", q)
        _checks.same_device(name, x, "q", q)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0], q, max_seqlen)
    seed = check_dropout(dropout_p, seed, q)
    if scale is None:
        scale = (q.shape[2] * (1 + (pos_key is not None) + (pos_query is not None))) ** -0.5
    index = _index_for(q, buckets, max_positions)
    return select("disentangled_attention", q)(
        q, k, v, pos_key, pos_query, index, cu_seqlens, max_seqlen,
        float(scale), float(dropout_p), seed,
    )[0]  # fmt: skip
