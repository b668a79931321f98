"""Windowed attention where the mask has holes: the window counts columns, not packed tokens."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastenc.nn import VarlenBatch
from fastenc.ops._registry import note_fallback


def windowed_with_gaps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: VarlenBatch,
    reach: int,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """Attention within ``|column_i - column_j| <= reach``, sequence by sequence, in plain PyTorch.

    q, k, v (T, heads, head_dim) -> (T, heads, head_dim).
    """
    note_fallback("attention_mask with holes: windowed attention runs in plain PyTorch")
    columns = batch.columns
    outs = []
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        here = columns[start:end]
        seen = (here.view(-1, 1) - here.view(1, -1)).abs() <= reach
        heads_first = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=seen, dropout_p=dropout_p, scale=scale
        )
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
