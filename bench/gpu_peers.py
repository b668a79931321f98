"""What fastenc's GPU kernels are held against. Each function makes a call from a row's tensors.

A peer that is not installed, or that refuses a shape, raises; the error is recorded in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]


@functools.cache
def compiled(fn: Callable) -> Callable:
    return torch.compile(fn, dynamic=False)


# ---- elementwise -------------------------------------------------------------------------------


def geglu(x: Tensor) -> Tensor:
    a, gate = x.chunk(2, dim=-1)
    return F.gelu(a) * gate


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    c, s = (t[positions][:, None, None].float() for t in (cos, sin))
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, weight.shape, weight), total


def segment_mean(x: Tensor, cu: Tensor) -> Tensor:
    return torch.segment_reduce(x.float(), "mean", offsets=cu.long()).to(x.dtype)


def liger_geglu(x: Tensor) -> Tensor:
    """Liger's GeGLU: the tanh approximation, other numbers than the erf form."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(*x.chunk(2, dim=-1))


def liger_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    total = x + residual
    return LigerLayerNormFunction.apply(total, weight, torch.zeros_like(weight), 1e-5), total


# ---- attention: q, k, v (total_tokens, heads, head_dim) ----------------------------------------


def torch_varlen(q, k, v, cu, longest: int, window: tuple[int, int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window)


def _flex_mask(cu: Tensor, total: int, window: tuple[int, int]):
    from torch.nn.attention.flex_attention import create_block_mask

    token = torch.arange(total, device=cu.device, dtype=cu.dtype)
    document = torch.searchsorted(cu, token, right=True)
    left, right = window

    def seen(b, h, i, j):
        same = document[i] == document[j]
        if left >= 0:
            same = same & (j >= i - left)
        if right >= 0:
            same = same & (j <= i + right)
        return same

    return create_block_mask(seen, None, None, total, total, device=str(cu.device))


def flex(q, k, v, mask) -> Tensor:
    """FlexAttention over the packed sequence; the block mask is made outside the timing."""
    from torch.nn.attention.flex_attention import flex_attention

    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return compiled(flex_attention)(*heads_first, block_mask=mask)[0].transpose(0, 1)


def cudnn_sdpa(q, k, v, num_seqs: int) -> Tensor:
    """Sequences of one length without a window."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batched = (x.unflatten(0, (num_seqs, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1)


def flash_attn(q, k, v, cu, longest: int, window: tuple[int, int]) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, window_size=window)


def attention_peers(cu: Tensor, lengths: tuple[int, ...], window: tuple[int, int]) -> dict:
    """{name: fn(q, k, v)} for a batch; making one may raise."""
    longest, total = max(lengths), sum(lengths)

    def with_flex():
        mask = _flex_mask(cu, total, window)
        return lambda q, k, v: flex(q, k, v, mask)

    def with_cudnn():
        if len(set(lengths)) > 1 or window != (-1, -1):
            raise NotImplementedError("cuDNN through SDPA takes one length and no window")
        return lambda q, k, v: cudnn_sdpa(q, k, v, len(lengths))

    return {
        "torch varlen": lambda: lambda q, k, v: torch_varlen(q, k, v, cu, longest, window),
        "FlexAttention": with_flex,
        "cuDNN SDPA": with_cudnn,
        "flash-attn": lambda: lambda q, k, v: flash_attn(q, k, v, cu, longest, window),
    }
