"""``flash_attn_varlen_func``: flash-attn's names and argument order, fastenc's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops.varlen_attention import check_window, varlen_attention_with_lse


def _refuse(**given) -> None:
    for name, (value, plain) in given.items():
        if value is not None and value != plain:
            raise NotImplementedError(f"flash_attn_varlen_func: {name}={value!r} is not supported")


def _same_lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int) -> None:
    if cu_seqlens_q is cu_seqlens_k:
        return
    _checks.tensor("cu_seqlens_q", cu_seqlens_q, 1)
    _checks.tensor("cu_seqlens_k", cu_seqlens_k, 1)
    same = cu_seqlens_q.shape == cu_seqlens_k.shape and max_q == max_k
    if same and _checks.readable(cu_seqlens_q):
        same = torch.equal(cu_seqlens_q, cu_seqlens_k)
    if not same:
        raise NotImplementedError(
            "flash_attn_varlen_func: only self-attention lengths are supported, but cu_seqlens_q "
            "and cu_seqlens_k differ"
        )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """Drop-in for flash-attn 2's function of this name, for self-attention.

    Args:
        q: (total_tokens, heads, head_dim). k, v: (total_tokens, heads_k, head_dim) with ``heads``
            a multiple of ``heads_k`` (grouped-query heads are expanded).
        cu_seqlens_q, cu_seqlens_k: (num_seqs + 1,) int32, equal (on a GPU their contents are
            compared only under ``debug_checks``).
        deterministic: accepted; fastenc's backward always is.

    Returns:
        out (total_tokens, heads, head_dim), or with ``return_attn_probs``
        (out, softmax_lse (heads, total_tokens) fp32, None).

    Raises:
        NotImplementedError: other lengths for keys, softcap, alibi_slopes, block_table.
    """
    _refuse(softcap=(softcap, 0.0))
    for name, value in (("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if value is not None:
            raise NotImplementedError(f"flash_attn_varlen_func: {name} is not supported")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.floating(name, x, 3)
    _same_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = check_window(window_size)
    if causal:
        right = 0
    if k.shape[1] != q.shape[1]:
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"k: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}"
            )
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out, lse = varlen_attention_with_lse(
        q, k, v, cu_seqlens_q, max_seqlen_q, (left, right), softmax_scale, dropout_p, None, None
    )
    return (out, lse, None) if return_attn_probs else out
