"""flash-attn, one more candidate of ``varlen_attention``: asked for by FASTENC_FLASH=1.

Off by default: which kernel runs should not change with what else is installed. Serves what
flash-attn computes as fastenc does: bf16 and fp16 on a GPU, head_dim a multiple of 8 up to 256, no
bias, no dropout (its mask is not fastenc's). ``record()`` shows it as backend "flash".
"""

from __future__ import annotations

import collections
import importlib
import os

import torch
from torch import Tensor

from fastenc.ops import _registry

ASKED_FOR = os.environ.get("FASTENC_FLASH") == "1"
DEVICES = ("cuda",)


def serves(q: Tensor, dropout_p: float, rel_bias: Tensor | None) -> bool:
    """Whether flash-attn was asked for, is there, and computes this call."""
    fits = (
        ASKED_FOR
        and _registry.chosen_backend() is None
        and q.device.type in DEVICES
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] % 8 == 0
        and q.shape[2] <= 256
        and dropout_p == 0.0
        and rel_bias is None
    )
    if not fits:
        return False
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        _registry.note_fallback(f"FASTENC_FLASH=1, but flash-attn does not import: {error}")
        return False
    return True


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """(total_tokens, heads, head_dim), by flash-attn's deterministic kernels."""
    _registry.count_launches(collections.Counter({("varlen_attention", "flash"): 1}))
    return importlib.import_module("flash_attn").flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        softmax_scale=scale, window_size=window_size, deterministic=True,
    )  # fmt: skip
