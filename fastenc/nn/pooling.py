"""Pooling of packed tokens into one row a sequence, in every mode of sentence-transformers.

x (total_tokens, hidden), cu_seqlens (num_seqs + 1,) -> (num_seqs, modes * hidden). With n_i tokens
in sequence i, x_t its t-th token from 0:

    mean                  sum_t x_t / n_i          max, cls, last   as fastenc.segment_pool
    mean_sqrt_len_tokens  sum_t x_t / sqrt(n_i)    weightedmean     sum_t (t+1) x_t / sum_t (t+1)

``weightedmean``: Muennighoff 2022, arXiv:2202.08904. An empty sequence gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastenc.ops import segment_pool

POOLING_MODES = ("mean", "cls", "max", "last", "mean_sqrt_len_tokens", "weightedmean")


def pool(
    x: Tensor, cu_seqlens: Tensor, modes: Sequence[str] = ("mean",), skipped: Tensor | None = None
) -> Tensor:
    """Pool packed tokens; several modes are concatenated in the order given.

    Args:
        x: (total_tokens, hidden), floating.
        cu_seqlens: (num_seqs + 1,) int32, 0 to total_tokens.
        modes: of ``POOLING_MODES``.
        skipped: (num_seqs,) integers: tokens of each sequence that were dropped before its first
            one in ``x`` (a prompt's). ``weightedmean`` counts on from them.

    Returns:
        (num_seqs, len(modes) * hidden), dtype of ``x``.

    Raises:
        ValueError: an unknown mode.
    """
    rows = []
    for mode in modes:
        if mode == "mean_sqrt_len_tokens":
            lengths = cu_seqlens.diff().unsqueeze(1)
            rows.append(segment_pool(x, cu_seqlens, "mean") * lengths.sqrt().to(x.dtype))
        elif mode == "weightedmean":
            rows.append(_weighted_mean(x, cu_seqlens, skipped))
        elif mode in POOLING_MODES:
            rows.append(segment_pool(x, cu_seqlens, mode))
        else:
            raise ValueError(f"pooling: expected one of {', '.join(POOLING_MODES)}, got {mode!r}")
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _weighted_mean(x: Tensor, cu_seqlens: Tensor, skipped: Tensor | None) -> Tensor:
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1] if skipped is None else cu_seqlens[:-1] - skipped
    token = torch.arange(1, x.shape[0] + 1, device=x.device)
    places = token - starts.repeat_interleave(lengths, output_size=x.shape[0])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = places.to(wide).unsqueeze(1)
    total = segment_pool(weights, cu_seqlens, "mean").clamp(min=1e-9)
    return (segment_pool(x.to(wide) * weights, cu_seqlens, "mean") / total).to(x.dtype)
