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


# ---- GLiNER ------------------------------------------------------------------------------------


def span_score(start: Tensor, end: Tensor, labels: Tensor, lengths, max_width: int) -> Tensor:
    """The folded head in plain PyTorch, texts of one length: writes (words, max_width, R)."""
    if len(set(lengths)) > 1:
        raise NotImplementedError("the plain form takes texts of one length")
    a, b = (x.unflatten(0, (len(lengths), -1)) for x in (start, end))
    step = torch.arange(lengths[0], device=start.device)[:, None]
    ends = (step + torch.arange(max_width, device=start.device)).clamp(max=lengths[0] - 1)
    rows = F.relu(a[:, :, None] + b[:, ends])
    return torch.einsum("bikr,bcr->bikc", rows, labels).flatten(0, 1)


def token_score(
    token: Tensor, label: Tensor, token_factor: Tensor, label_factor: Tensor, weight: Tensor,
    out_weight: Tensor, lengths,
) -> Tensor:  # fmt: skip
    """The split head in plain PyTorch, texts of one length: writes (words, C, R + D)."""
    if len(set(lengths)) > 1:
        raise NotImplementedError("the plain form takes texts of one length")
    a, s = (x.unflatten(0, (len(lengths), -1))[:, :, None] for x in (token, token_factor))
    hidden = F.relu(a + label[:, None] + F.linear(s * label_factor[:, None], weight))
    return F.linear(hidden, out_weight).flatten(0, 1)


def hf_disentangled(lengths, heads: int, head_dim: int, buckets: int, far: int) -> Call:
    """transformers' DebertaV2 attention without its projections, texts of one length.

    Its q, k and v are one tensor here, which changes no shape; its projections and those of the
    relative embeddings are left out, as they are from ours.
    """
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    if len(set(lengths)) > 1:
        raise NotImplementedError("transformers pads: texts of one length only")
    config = DebertaV2Config(
        hidden_size=heads * head_dim, num_attention_heads=heads, pos_att_type=["c2p", "p2c"],
        relative_attention=True, position_buckets=buckets, max_relative_positions=far,
        share_att_key=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = DisentangledSelfAttention(config)
    for name in ("query_proj", "key_proj", "value_proj"):
        setattr(module, name, torch.nn.Identity())

    def run(q, k, v, pos_key, pos_query):
        hidden = q.flatten(1).unflatten(0, (len(lengths), -1))
        seen = torch.ones(len(lengths), 1, lengths[0], lengths[0], dtype=torch.bool)
        table = pos_key.transpose(0, 1).flatten(1)
        return module(hidden, seen.to(q.device), rel_embeddings=table)[0].flatten(0, 1)

    return run


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
