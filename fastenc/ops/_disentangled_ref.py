"""Plain PyTorch kernels of disentangled attention: what the other backends are held to."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fastenc.ops._philox import keep_mask
from fastenc.ops._rules import wide


def relative_index(buckets: int, max_positions: int, device: torch.device | None = None) -> Tensor:
    """(2 R + 1,) int32: the row of a position table for the distances i - j from -R to R.

    Every step as in transformers' make_log_bucket_position, in float32, so that each boundary
    falls where it falls there. Constant beyond R = max_positions; without a logarithm
    (max_positions = 0) the row is the distance itself, clamped, and R = buckets.
    """
    radius = max_positions if max_positions > 0 else buckets
    distance = torch.arange(-radius, radius + 1, device=device)
    row = distance
    if max_positions > 0:
        middle = buckets // 2
        size = distance.abs()
        size = torch.where(size < middle, middle - 1, size)
        whole = math.log((max_positions - 1) / middle)
        ratio = torch.log(size.float() / middle)
        ratio = ratio / torch.full((), whole, dtype=torch.float32, device=device)
        row = torch.ceil(ratio * (middle - 1)) + middle
        row = torch.where(size <= middle, distance.to(row.dtype), row * distance.sign()).long()
    return (row + buckets).clamp(0, 2 * buckets - 1).int()


def _rows(rel_index: Tensor, length: int) -> Tensor:
    """(length, length) int64: the table row of query i and key j."""
    radius = rel_index.shape[0] // 2
    position = torch.arange(length, device=rel_index.device)
    distance = (position.view(-1, 1) - position).clamp(-radius, radius)
    return rel_index[distance + radius].long()


def _scores(q, k, pos_key, pos_query, rows, scale):
    scores = torch.einsum("ihd,jhd->hij", q, k)
    index = rows.expand(q.shape[1], -1, -1)
    if pos_key is not None:
        scores = scores + torch.einsum("ihd,hpd->hip", q, pos_key).gather(-1, index)
    if pos_query is not None:
        p2c = torch.einsum("jhd,hpd->hjp", k, pos_query)
        scores = scores + p2c.gather(-1, index.mT).mT
    return scores * scale


def disentangled_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    rel_index: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable specification at the dtype of ``q``: (out, lse (heads, total_tokens))."""
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0)]
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        rows = _rows(rel_index, end - start)
        scores = _scores(q[start:end], k[start:end], pos_key, pos_query, rows, scale)
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - lse.unsqueeze(-1))
        if dropout_p > 0:
            tokens = torch.arange(start, end, device=q.device)
            p = p * keep_mask(tokens, end - start, q.shape[1], dropout_p, seed) / (1 - dropout_p)
        outs.append(torch.einsum("hij,jhd->ihd", p.to(v.dtype), v[start:end]))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def forward_ref(
    q, k, v, pos_key, pos_query, rel_index, cu_seqlens, max_seqlen, scale, dropout_p, seed
) -> tuple[Tensor, Tensor]:
    pos_key, pos_query = (None if x is None else wide(x) for x in (pos_key, pos_query))
    out, lse = disentangled_attention_ref(
        wide(q), wide(k), wide(v), pos_key, pos_query, rel_index, cu_seqlens, scale, dropout_p, seed
    )
    return out.to(q.dtype), lse


def backward_ref(
    grad_out, q, k, v, pos_key, pos_query, out, lse, rel_index, cu_seqlens, max_seqlen,
    scale, dropout_p, seed,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wq, wk, wv, g = wide(q), wide(k), wide(v), wide(grad_out)
    pk, pq = (None if x is None else wide(x) for x in (pos_key, pos_query))
    dq, dk, dv = torch.zeros_like(wq), torch.zeros_like(wk), torch.zeros_like(wv)
    dpk, dpq = (g.new_zeros(0) if x is None else torch.zeros_like(x) for x in (pk, pq))
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        span = slice(start, end)
        rows = _rows(rel_index, end - start)
        p = torch.exp(_scores(wq[span], wk[span], pk, pq, rows, scale) - lse[:, span].unsqueeze(-1))
        dp = torch.einsum("ihd,jhd->hij", g[span], wv[span])
        dropped = p
        if dropout_p > 0:
            tokens = torch.arange(start, end, device=q.device)
            kept = keep_mask(tokens, end - start, q.shape[1], dropout_p, seed) / (1 - dropout_p)
            dropped, dp = p * kept, dp * kept
        dv[span] = torch.einsum("hij,ihd->jhd", dropped, g[span])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[span] = torch.einsum("hij,jhd->ihd", ds, wk[span])
        dk[span] = torch.einsum("hij,ihd->jhd", ds, wq[span])
        index = rows.expand(q.shape[1], -1, -1)
        if pk is not None:
            by_row = ds.new_zeros(*ds.shape[:2], pk.shape[1]).scatter_add(-1, index, ds)
            dq[span] += torch.einsum("hip,hpd->ihd", by_row, pk)
            dpk += torch.einsum("hip,ihd->hpd", by_row, wq[span])
        if pq is not None:
            by_row = ds.new_zeros(*ds.shape[:2], pq.shape[1]).scatter_add(-1, index.mT, ds.mT)
            dk[span] += torch.einsum("hjp,hpd->jhd", by_row, pq)
            dpq += torch.einsum("hjp,jhd->hpd", by_row, wk[span])
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dpk.to(q.dtype), dpq.to(q.dtype)
