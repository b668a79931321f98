"""RoPE and packed attention in one pass: q and k are rotated as they are loaded.

qkv (total_tokens, 3, heads, head_dim) -> (total_tokens, heads, head_dim); positions restart with
each sequence. What is computed: :mod:`fastenc.ops.rope` on q and k, then
:mod:`fastenc.ops.varlen_attention`; no rotated copy of q and k is made in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._attention_ref import rope_backward_ref, rope_forward_ref
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import at_most_float32, lower_precision, statistics_dtype
from fastenc.ops.rope import check_tables
from fastenc.ops.varlen_attention import _SHAPE, check_dropout, check_window


def _forward_fake(qkv, cos, sin, cu_seqlens, max_seqlen, left, right, scale, dropout_p, seed):
    total, _, heads, head_dim = qkv.shape
    stats = statistics_dtype(qkv)
    return qkv.new_empty(total, heads, head_dim), qkv.new_empty(heads, total, dtype=stats)


def _backward_fake(
    grad_out, grad_lse, qkv, cos, sin, out, lse, cu_seqlens, max_seqlen,
    left, right, scale, dropout_p, seed,
):  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, cos, sin, cu_seqlens, *ctx.plain, seed = inputs
    ctx.save_for_backward(qkv, cos, sin, *output, cu_seqlens, seed)


def _differentiate(ctx, bwd, grad_out, grad_lse):
    qkv, cos, sin, out, lse, cu_seqlens, seed = ctx.saved_tensors
    nothing = (None,) * 9
    if grad_out is None and grad_lse is None:
        return None, *nothing
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return bwd(grad_out, grad_lse, qkv, cos, sin, out, lse, cu_seqlens, *ctx.plain, seed), *nothing


define(
    OpSpec(
        name="rope_varlen_attention",
        forward=f"(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens, {_SHAPE}, Tensor? seed)"
        " -> (Tensor out, Tensor lse)",
        backward="(Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor cos, Tensor sin,"
        f" Tensor out, Tensor lse, Tensor cu_seqlens, {_SHAPE}, Tensor? seed) -> Tensor",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=rope_forward_ref,
        backward_ref=rope_backward_ref,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(3),  # flash-attn's rotary tables, too, are in the dtype of qkv
        cpu_refuses=_checks.cpu_head_dim,
        cuda_refuses=_checks.cuda_head_dim,
    )
)


# For tensors that a model owns: into ``out``, contiguous, without the log-sum-exp.
def _into_ref(qkv, cos, sin, cu_seqlens, max_seqlen, left, right, scale, out) -> None:
    plain = (cu_seqlens, max_seqlen, left, right, scale, 0.0, None)
    out.copy_(rope_forward_ref(qkv, cos, sin, *plain)[0])


define(
    OpSpec(
        name="rope_varlen_attention_into",
        forward="(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens, SymInt max_seqlen,"
        " int window_left, int window_right, float scale, Tensor(a!) out) -> ()",
        forward_fake=lambda *args: None,
        forward_ref=_into_ref,
    )
)


def rope_varlen_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Rotate q and k, then attend within each packed sequence.

    Args:
        qkv: (total_tokens, 3, heads, head_dim), any strides, even head_dim.
        cos, sin: (max_pos, head_dim // 2), any floating-point dtype; max_pos >= max_seqlen. Under
            autocast they are rounded to its dtype, with qkv.
        cu_seqlens, max_seqlen, window_size, scale, dropout_p, seed: as in ``varlen_attention``.

    Returns:
        (total_tokens, heads, head_dim), dtype of ``qkv``; the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or cu_seqlens do not fit, or a table is
            shorter than ``max_seqlen``.
    """
    _checks.floating("qkv", qkv, 4)
    if qkv.shape[1] != 3 or qkv.shape[3] % 2 or qkv.shape[3] < 2:
        raise ValueError(
            f"qkv: expected (total_tokens, 3, heads, even head_dim), got {tuple(qkv.shape)}"
        )
    check_tables(cos, sin, qkv.shape[3], qkv)
    cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, qkv.shape[0], qkv, max_seqlen)
    if max_seqlen > cos.shape[0]:
        raise ValueError(
            f"cos: expected at least max_seqlen = {max_seqlen} rows, got {cos.shape[0]}"
        )
    left, right = check_window(window_size)
    seed = check_dropout(dropout_p, seed, qkv)
    scale = qkv.shape[3] ** -0.5 if scale is None else float(scale)
    cos, sin = at_most_float32(cos, qkv), at_most_float32(sin, qkv)
    return select("rope_varlen_attention", qkv)(
        qkv, cos, sin, cu_seqlens, max_seqlen, left, right, scale, float(dropout_p), seed
    )[0]
