"""RoPE and packed attention from qkv (total_tokens, 3, heads, head_dim), no rotated qkv in memory.

In a window the forward and the backward kernel rotate q and k as they load them. Without one, a
key tile meets every query tile of its sequence, so k is rotated once into a workspace (the backward
does so with q and k); the forward's q is still rotated as it is loaded. dq and dk are rotated back
in registers before they are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels import varlen_attention_launch as choose
from fastenc.triton_kernels.rope import rotate
from fastenc.triton_kernels.varlen_attention import (
    Options,
    attend,
    attend_backward,
    check_head_dim,
)


def _options(qkv, cos, sin, cu_seqlens, left, right, scale, dropout_p, seed) -> Options:
    check_head_dim(qkv.shape[3])
    cos, sin, cu = (_common.unit_rows(x) for x in (cos, sin, cu_seqlens))
    return Options(cu, left, right, scale, dropout_p, seed, None, cos, sin)


def _rotated(x: Tensor, options: Options) -> Tensor:
    """A rotated copy of ``x``, positions restarting with each sequence."""
    out = _common.empty(x.shape, x.dtype, x.device)
    return rotate(x, options.cos, options.sin, options.cu_seqlens, out, from_cu=True)


def rope_varlen_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: int,
    right: int, scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total, _, heads, head_dim = qkv.shape
    out = _common.empty((total, heads, head_dim), qkv.dtype, qkv.device)
    lse = _common.empty((heads, total), torch.float32, qkv.device)
    if qkv.numel() == 0:
        return out, lse
    options = _options(qkv, cos, sin, cu_seqlens, left, right, scale, dropout_p, seed)
    q, k, v = _common.tile_rows(qkv).unbind(1)
    if not choose.windowed_forward(options.need(q), _common.chip_of(qkv.device)):
        k = _rotated(k, options)
    attend(q, k, v, out, lse, options)
    return out, lse


def rope_varlen_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor,
    lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: int, right: int, scale: float,
    dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    dqkv = _common.empty(qkv.shape, qkv.dtype, qkv.device)
    if qkv.numel() == 0:
        return dqkv
    options = _options(qkv, cos, sin, cu_seqlens, left, right, scale, dropout_p, seed)
    qkv, out, grad_out = (_common.tile_rows(x) for x in (qkv, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    q, k, v = qkv.unbind(1)
    narrow = bool(choose.windowed_backward(options.need(q), _common.chip_of(qkv.device)))
    if not narrow:
        q, k = _rotated(qkv[:, :2], options).unbind(1)
    attend_backward(
        q, k, v, out, grad_out, lse.contiguous(), grad_lse, *dqkv.unbind(1), None, options,
        rotated=not narrow,
    )  # fmt: skip
    return dqkv
