"""GeGLU: ``act(x[..., :I]) * x[..., I:]``, activation on the first half.

x (..., 2 I) -> (..., I). ModernBERT's ``Wo(act(input) * gate)``, ``input, gate = Wi(h).chunk(2)``
(Warner et al. 2024, arXiv:2412.13663; GLU variants: Shazeer 2020, arXiv:2002.05202). Arithmetic in
fp32, one rounding on the way out; the backward recomputes the activation from the saved input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import lower_precision, wide

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


def _activate(a: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(a)
    return F.gelu(a, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_slope(a: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        s = torch.sigmoid(a)
        return s * (1 + a * (1 - s))
    if activation == "gelu":
        return 0.5 * torch.erfc(-a * math.sqrt(0.5)) + a * torch.exp(-0.5 * a * a) / math.sqrt(
            2 * math.pi
        )
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (a + 0.044715 * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * 0.044715 * a * a)


def geglu_ref(x: Tensor, activation: str = "gelu") -> Tensor:
    """The specification, in plain differentiable PyTorch at the dtype of ``x``."""
    a, gate = x.chunk(2, dim=-1)
    return _activate(a, activation) * gate


def _forward_ref(x: Tensor, activation: str) -> Tensor:
    return geglu_ref(wide(x), activation).to(x.dtype)


def _backward_ref(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    a, gate = wide(x).chunk(2, dim=-1)
    g = wide(grad)
    da = g * gate * _activation_slope(a, activation)
    return torch.cat([da, g * _activate(a, activation)], dim=-1).to(x.dtype)


def _forward_fake(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward_fake(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, bwd, grad):
    (x,) = ctx.saved_tensors
    return (None if grad is None else bwd(grad, x, ctx.activation)), None


define(
    OpSpec(
        name="geglu",
        forward="(Tensor x, str activation) -> Tensor",
        backward="(Tensor grad, Tensor x, str activation) -> Tensor",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=_forward_ref,
        backward_ref=_backward_ref,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(1),
    )
)


def geglu(x: Tensor, activation: str = "gelu") -> Tensor:
    """``act(x[..., :I]) * x[..., I:]``.

    Args:
        x: (..., 2 I), float32, bfloat16 or float16 (float64 runs in plain PyTorch).
        activation: "gelu" (erf, as ModernBERT), "gelu_tanh" or "silu".

    Returns:
        (..., I), dtype of ``x``; the autocast dtype under autocast.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: the last dimension is odd or missing, or the activation is unknown.
    """
    _checks.floating("x", x)
    _checks.one_of("activation", activation, ACTIVATIONS)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: expected a last dimension of even size 2 I, got {tuple(x.shape)}")
    return select("geglu", x)(x, activation)
