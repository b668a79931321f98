"""Dropout in training on a CPU, without torch's serial generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastenc.nn._modules import is_unhooked
from fastenc.ops._registry import KERNEL_DTYPES, runs_on_cpu, unavailable
from fastenc.ops.varlen_attention import check_dropout


def dropout(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; a plain ``nn.Dropout`` in training on a CPU by a mask of fastenc's own.

    Other numbers than torch's from the same state of its generator, which is drawn from once.

    Args:
        module: any module; what is not exactly an ``nn.Dropout`` or has hooks is called.
        x: of any shape.
    """
    if (
        type(module) is not nn.Dropout
        or not module.training
        or not 0.0 < module.p < 1.0
        or module.inplace
        or x.dtype not in KERNEL_DTYPES
        or not runs_on_cpu(x)
        or not is_unhooked(module)
        or unavailable("dropout", "cpu") is not None
    ):
        return module(x)
    return torch.ops.fastenc.dropout_fwd(x, module.p, check_dropout(module.p, None, x))
