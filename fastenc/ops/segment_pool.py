"""Segment pooling: one row for each packed sequence.

x (total_tokens, hidden), cu_seqlens (num_seqs + 1,) -> (num_seqs, hidden). mean, max, "cls" (first
token) or "last" (last token) of each segment; fp32 accumulation in a fixed order; an empty sequence
gives zeros. A maximum's gradient goes to its first occurrence.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import wide

MODES = ("mean", "cls", "max", "last")


def segment_pool_ref(x: Tensor, cu_seqlens: Tensor, mode: str = "mean") -> Tensor:
    """The specification, in plain differentiable PyTorch at the dtype of ``x``."""
    edges = cu_seqlens.tolist()
    rows = []
    for start, end in itertools.pairwise(edges):
        tokens = x[start:end]
        if start == end:
            rows.append(x.new_zeros(x.shape[1]))
        elif mode == "mean":
            rows.append(tokens.mean(0))
        elif mode == "max":
            rows.append(tokens.max(0).values)
        else:
            rows.append(tokens[0 if mode == "cls" else -1])
    return torch.stack(rows) if rows else x.new_empty(0, x.shape[1])


def _forward_ref(x, cu_seqlens, mode):
    out = segment_pool_ref(wide(x), cu_seqlens, mode).to(x.dtype)
    index = x.new_empty(0, dtype=torch.int32)
    if mode == "max":
        index = x.new_full(out.shape, -1, dtype=torch.int32)
        edges = cu_seqlens.tolist()
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            if end > start:
                index[i] = (x[start:end].max(0).indices + start).to(torch.int32)
    return out, index


def _backward_ref(grad, index, cu_seqlens, total_tokens, mode):
    dx = wide(grad).new_zeros(total_tokens, grad.shape[1])
    edges = cu_seqlens.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        if start == end:
            continue
        if mode == "mean":
            dx[start:end] = wide(grad[i]) / (end - start)
        elif mode == "max":
            dx.scatter_(0, index[i : i + 1].long(), wide(grad[i : i + 1]))
        else:
            dx[start if mode == "cls" else end - 1] = wide(grad[i])
    return dx.to(grad.dtype)


def _forward_fake(x, cu_seqlens, mode):
    out = x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])
    return out, x.new_empty(out.shape if mode == "max" else 0, dtype=torch.int32)


def _backward_fake(grad, index, cu_seqlens, total_tokens, mode):
    return grad.new_empty(total_tokens, grad.shape[1])


def _save(ctx, inputs, output):
    x, cu_seqlens, ctx.mode = inputs
    ctx.total_tokens = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], cu_seqlens)


def _differentiate(ctx, bwd, grad, _index):
    if grad is None:
        return None, None, None
    return bwd(grad, *ctx.saved_tensors, ctx.total_tokens, ctx.mode), None, None


define(
    OpSpec(
        name="segment_pool",
        forward="(Tensor x, Tensor cu_seqlens, str mode) -> (Tensor out, Tensor index)",
        backward="(Tensor grad, Tensor index, Tensor cu_seqlens, SymInt total_tokens, str mode)"
        " -> Tensor",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=_forward_ref,
        backward_ref=_backward_ref,
        save=_save,
        differentiate=_differentiate,
    )
)


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean") -> Tensor:
    """Reduce each packed sequence to one row.

    Args:
        x: (total_tokens, hidden), float32, bfloat16 or float16.
        cu_seqlens: (num_seqs + 1,) int32, 0 to total_tokens.
        mode: "mean", "cls", "max" or "last".

    Returns:
        (num_seqs, hidden), dtype of ``x`` (also under autocast); zeros for an empty sequence.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or an unknown mode.
    """
    _checks.floating("x", x, 2)
    _checks.one_of("mode", mode, MODES)
    cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x)
    return select("segment_pool", x)(x, cu_seqlens, mode)[0]
