"""Linear: ``x w^T + bias``, the matrix product under the linear layers, fp32 on a CPU.

x (M, K), weight (N, K), bias (N,) -> y (M, N), dense, which the caller brings: a model's layers
write to the same memory (``fastenc/models/_modernbert_inference.py``). torch's ``F.linear`` takes
MKL, which keeps its best kernels for Intel's processors. Few rows or columns are dot products over
the weight as it lies; the rest is cut into panels (Goto and van de Geijn 2008) that add up at most
192 products a run, as MKL's do: the same rounding error. :func:`fastenc.nn.linear` decides where it
is taken and has its gradients, which are the same product of transposed views. ``linear_geglu`` is
``geglu`` of a product, which never lies in memory whole.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastenc.ops._registry import OpSpec, define
from fastenc.ops.geglu import geglu_ref


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification, in plain differentiable PyTorch."""
    return F.linear(x, weight, bias)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    y.copy_(linear_ref(x, weight, bias))


define(
    OpSpec(
        name="linear",
        forward="(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()",
        forward_fake=lambda x, weight, bias, y: None,
        forward_ref=_forward,
    )
)


def linear_geglu_ref(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The specification of the gated product, in plain differentiable PyTorch."""
    return geglu_ref(F.linear(x, weight, bias), activation)


def _gated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, y: Tensor) -> None:
    y.copy_(linear_geglu_ref(x, weight, bias, activation))


define(
    OpSpec(
        name="linear_geglu",
        forward="(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor(a!) y) -> ()",
        forward_fake=lambda x, weight, bias, activation, y: None,
        forward_ref=_gated,
    )
)
