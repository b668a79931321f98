"""Plain PyTorch kernels of packed attention: the specification the other backends are held to."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastenc.ops._philox import keep_mask
from fastenc.ops._rules import wide
from fastenc.ops.rope import rope_ref


def reach(length: int, left: int, right: int, device: torch.device) -> Tensor:
    """(length, length) bool: key j is in the window of query i, ``i - left <= j <= i + right``."""
    index = torch.arange(length, device=device)
    distance = index.view(1, -1) - index.view(-1, 1)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def _distance_rows(length: int, radius: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    return (index.view(1, -1) - index.view(-1, 1)).clamp(-radius, radius) + radius


def _scores(q, k, seen, scale, table):
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if table is not None:
        rows = _distance_rows(q.shape[0], (table.shape[1] - 1) // 2, q.device)
        scores = scores + table[:, rows].to(scores.dtype)
    return scores.masked_fill(~seen, float("-inf"))


def varlen_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable specification at the dtype of ``q``: (out, lse (heads, total_tokens)).

    ``table`` (heads, 2 R + 1) is added to the scaled scores by the distance ``j - i`` clamped to R.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    edges = cu_seqlens.tolist()
    outs, lses = [], []
    for start, end in itertools.pairwise(edges):
        seen = reach(end - start, *window_size, q.device)
        scores = _scores(q[start:end], k[start:end], seen, scale, table)
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~seen, 0.0)
        if dropout_p > 0:
            rows = torch.arange(start, end, device=q.device)
            kept = keep_mask(rows, end - start, q.shape[1], dropout_p, seed)
            p = p * kept / (1 - dropout_p)
        outs.append(torch.einsum("hij,jhd->ihd", p.to(v.dtype), v[start:end]))
        lses.append(lse)
    if not outs:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[1], 0)
    return torch.cat(outs), torch.cat(lses, dim=1)


def forward_ref(
    q, k, v, cu_seqlens, max_seqlen, left, right, scale, dropout_p, seed, table
) -> tuple[Tensor, Tensor]:
    out, lse = varlen_attention_ref(
        wide(q), wide(k), wide(v), cu_seqlens, (left, right), scale, dropout_p, seed, table
    )
    return out.to(q.dtype), lse


def backward_ref(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, max_seqlen,
    left, right, scale, dropout_p, seed, table,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wq, wk, wv, g = wide(q), wide(k), wide(v), wide(grad_out)
    dq, dk, dv = torch.zeros_like(wq), torch.zeros_like(wk), torch.zeros_like(wv)
    dtable = g.new_zeros(0 if table is None else table.shape)
    edges = cu_seqlens.tolist()
    for start, end in itertools.pairwise(edges):
        span = slice(start, end)
        seen = reach(end - start, left, right, q.device)
        scores = _scores(wq[span], wk[span], seen, scale, table)
        p = torch.exp(scores - lse[:, span].unsqueeze(-1)).masked_fill(~seen, 0.0)
        dp = torch.einsum("ihd,jhd->hij", g[span], wv[span])
        dropped = p
        if dropout_p > 0:
            rows = torch.arange(start, end, device=q.device)
            kept = keep_mask(rows, end - start, q.shape[1], dropout_p, seed) / (1 - dropout_p)
            dropped, dp = p * kept, dp * kept
        dv[span] = torch.einsum("hij,ihd->jhd", dropped, g[span])
        delta = (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, span].unsqueeze(-1)
        ds = p * (dp - delta)
        dq[span] = torch.einsum("hij,jhd->ihd", ds, wk[span]) * scale
        dk[span] = torch.einsum("hij,ihd->jhd", ds, wq[span]) * scale
        if table is not None:
            rows = _distance_rows(end - start, (table.shape[1] - 1) // 2, q.device)
            dtable.index_add_(1, rows.flatten(), ds.flatten(1))
    dtable = dtable.to(q.dtype if table is None else table.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtable


def positions_of(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """(total_tokens,) int64: each token's index within its own sequence."""
    token = torch.arange(total_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[sequence]).long()


def rope_varlen_attention_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable specification: rotation, then packed attention, at the dtype of qkv."""
    rotated = rope_ref(qkv[:, :2], cos, sin, positions_of(cu_seqlens, qkv.shape[0]))
    q, k = rotated.unbind(1)
    return varlen_attention_ref(q, k, qkv[:, 2], cu_seqlens, window_size, scale, dropout_p, seed)


def _rotated(qkv, cos, sin, cu_seqlens):
    x, positions = wide(qkv), positions_of(cu_seqlens, qkv.shape[0])
    q, k = rope_ref(x[:, :2], cos.to(x.dtype), sin.to(x.dtype), positions).unbind(1)
    return q, k, x[:, 2], positions


def rope_forward_ref(
    qkv, cos, sin, cu_seqlens, max_seqlen, left, right, scale, dropout_p, seed
) -> tuple[Tensor, Tensor]:
    q, k, v, _ = _rotated(qkv, cos, sin, cu_seqlens)
    out, lse = varlen_attention_ref(
        q, k, v, cu_seqlens, (left, right), scale, dropout_p, seed, None
    )
    return out.to(qkv.dtype), lse


def rope_backward_ref(
    grad_out, grad_lse, qkv, cos, sin, out, lse, cu_seqlens, max_seqlen,
    left, right, scale, dropout_p, seed,
) -> Tensor:  # fmt: skip
    q, k, v, positions = _rotated(qkv, cos, sin, cu_seqlens)
    dq, dk, dv, _ = backward_ref(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, max_seqlen,
        left, right, scale, dropout_p, seed, None,
    )  # fmt: skip
    inverse = rope_ref(torch.stack([dq, dk], 1), cos.to(dq.dtype), -sin.to(dq.dtype), positions)
    return torch.cat([inverse, dv.unsqueeze(1)], dim=1).to(qkv.dtype)
