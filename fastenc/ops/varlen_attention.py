"""Attention over packed sequences, with windows: no padding, no mask in memory.

q, k, v (total_tokens, heads, head_dim), cu_seqlens (num_seqs + 1,) -> (total_tokens, heads,
head_dim). Query i of a sequence sees its keys j with ``i - left <= j <= i + right`` (inclusive, as
flash-attn; -1 = unlimited; ModernBERT's local_attention=128 is (64, 64)):

    out_i = sum_j dropout(softmax_j(scale q_i . k_j + rel_bias[bucket(j - i)])) v_j

Softmax statistics in fp32. A row with no key gives zeros. FlashAttention: Dao et al. 2022,
arXiv:2205.14135; relative buckets: Raffel et al. 2020, arXiv:1910.10683; MPNet: arXiv:2004.09297.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastenc.ops import _checks, _flash
from fastenc.ops._attention_ref import backward_ref, forward_ref
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import at_most_float32, lower_precision, statistics_dtype

MAX_DISTANCE = 128


def relative_buckets(num_buckets: int, device: torch.device | None = None) -> Tensor:
    """(2 * 128 + 1,) int64: the T5/MPNet bucket (bidirectional) of the distances -128 to 128.

    Exact below a quarter of the buckets, logarithmic up to 128 and constant beyond; computed in
    float32 as transformers does, so that every boundary falls where it falls there.
    """
    n = torch.arange(MAX_DISTANCE, -MAX_DISTANCE - 1, -1, device=device)
    half = num_buckets // 2
    exact = half // 2
    base = (n < 0).long() * half
    n = n.abs()
    log_ratio = torch.log(n.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    large = (exact + (log_ratio * (half - exact)).long()).clamp(max=half - 1)
    return base + torch.where(n < exact, n, large)


def _forward_fake(q, k, v, cu_seqlens, max_seqlen, left, right, scale, dropout_p, seed, table):
    stats = statistics_dtype(q)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=stats)


def _backward_fake(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, max_seqlen,
    left, right, scale, dropout_p, seed, table,
):  # fmt: skip
    dtable = q.new_empty(0) if table is None else table.new_empty(table.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dtable


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.plain, seed, table = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seed, table)


def _differentiate(ctx, bwd, grad_out, grad_lse):
    q, k, v, out, lse, cu_seqlens, seed, table = ctx.saved_tensors
    nothing = (None,) * 6
    if grad_out is None and grad_lse is None:
        return None, None, None, None, *nothing, None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    dq, dk, dv, dtable = bwd(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, *ctx.plain, seed, table
    )
    return dq, dk, dv, None, *nothing, None if table is None else dtable


_SHAPE = "SymInt max_seqlen, int window_left, int window_right, float scale, float dropout_p"

define(
    OpSpec(
        name="varlen_attention",
        forward=f"(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, {_SHAPE}, Tensor? seed,"
        " Tensor? rel_bias) -> (Tensor out, Tensor lse)",
        backward="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
        f" Tensor lse, Tensor cu_seqlens, {_SHAPE}, Tensor? seed, Tensor? rel_bias)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor drel_bias)",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=forward_ref,
        backward_ref=backward_ref,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(3),
        cpu_refuses=_checks.cpu_head_dim,
        cuda_refuses=_checks.cuda_head_dim,
    )
)


def check_window(window_size: object) -> tuple[int, int]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}") from None
    if not (_checks.is_int(left) and _checks.is_int(right)) or left < -1 or right < -1:
        raise ValueError(f"window_size: expected two ints >= -1, got {window_size!r}")
    return left, right


def check_dropout(dropout_p: float, seed: int | Tensor | None, like: Tensor) -> Tensor | None:
    """The seed as the kernels take it: int64, one element, on ``like``'s device; None at p = 0."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
            raise ValueError(
                f"seed: expected one int64 element on {like.device}, got {seed.dtype} "
                f"{tuple(seed.shape)} on {seed.device}"
            )
        return seed.reshape(1)
    if not _checks.is_int(seed):
        raise TypeError(f"seed: expected an int, a tensor or None, got {type(seed).__name__}")
    if isinstance(seed, int):
        seed = (seed + 2**63) % 2**64 - 2**63  # its 64 bits
    return torch.full((1,), seed, dtype=torch.int64, device=like.device)


def _check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """cu_seqlens as the kernels take it."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.floating(name, x, 3)
        _checks.same_dtype(name, x, "q", q)
        _checks.same_device(name, x, "q", q)
        if x.shape != q.shape:
            raise ValueError(
                f"{name}: expected the shape of q {tuple(q.shape)}, got {tuple(x.shape)}"
            )
    if q.shape[2] < 1:
        raise ValueError(f"q: expected head_dim >= 1, got shape {tuple(q.shape)}")
    return _checks.cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0], q, max_seqlen)


def varlen_attention_with_lse(
    q, k, v, cu_seqlens, max_seqlen, window_size, scale, dropout_p, seed, rel_bias
) -> tuple[Tensor, Tensor]:
    """:func:`varlen_attention` and the log-sum-exp of each row, (heads, total_tokens) fp32."""
    cu_seqlens = _check_packed(q, k, v, cu_seqlens, max_seqlen)
    left, right = check_window(window_size)
    seed = check_dropout(dropout_p, seed, q)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    table = None
    if rel_bias is not None:
        _checks.floating("rel_bias", rel_bias, 2)
        _checks.same_device("rel_bias", rel_bias, "q", q)
        if rel_bias.shape[0] != q.shape[1] or rel_bias.shape[1] < 4 or rel_bias.shape[1] % 2:
            raise ValueError(
                f"rel_bias: expected (heads = {q.shape[1]}, an even number of buckets >= 4), "
                f"got {tuple(rel_bias.shape)}"
            )
        rel_bias = at_most_float32(rel_bias, q)
        table = rel_bias[:, relative_buckets(rel_bias.shape[1], rel_bias.device)]
    return select("varlen_attention", q)(
        q, k, v, cu_seqlens, max_seqlen, left, right, scale, float(dropout_p), seed, table
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    rel_bias: Tensor | None = None,
) -> Tensor:
    """Self-attention of packed sequences.

    Args:
        q, k, v: (total_tokens, heads, head_dim), one dtype (under autocast any), any strides.
        cu_seqlens: (num_seqs + 1,) int32, 0 to total_tokens. max_seqlen: at least the longest.
        window_size: (left, right), inclusive, -1 = unlimited.
        scale: of the scores, ``head_dim ** -0.5`` by default.
        dropout_p: of the probabilities, in [0, 1); ``seed`` (an int, or one int64 on the device of
            q; drawn from torch's generator if None) fixes the mask, the same on every backend.
        rel_bias: (heads, num_buckets) T5/MPNet bias, bidirectional, maximal distance 128; it
            receives its gradient.

    Returns:
        (total_tokens, heads, head_dim), dtype of ``q``; the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or cu_seqlens do not fit (the contents of
            cu_seqlens are read on the CPU, and on a GPU under ``debug_checks``).
    """
    if _flash.ASKED_FOR and _flash.serves(q, dropout_p, rel_bias):
        cu_seqlens = _check_packed(q, k, v, cu_seqlens, max_seqlen)
        scale = q.shape[2] ** -0.5 if scale is None else float(scale)
        window_size = check_window(window_size)
        if q.dtype == k.dtype == v.dtype:  # else autocast makes them one
            return _flash.attend(q, k, v, cu_seqlens, max_seqlen, window_size, scale)
    return varlen_attention_with_lse(
        q, k, v, cu_seqlens, max_seqlen, window_size, scale, dropout_p, seed, rel_bias
    )[0]
