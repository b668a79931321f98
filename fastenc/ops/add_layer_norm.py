"""Residual add and LayerNorm in one pass: ``total = x + residual``; ``normed = LN(total) w + b``.

x, residual (..., hidden) -> normed, total (..., hidden). The sum is rounded once to the promoted
dtype of x and residual and normalised from there; statistics in fp32 (Ba et al. 2016,
arXiv:1607.06450). The backward reduces dweight and dbias in two passes, deterministically.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import (
    KERNEL_DTYPES,
    OpSpec,
    define,
    runs_on_cpu,
    select,
    unavailable,
)
from fastenc.ops._rules import (
    at_most_float32,
    layer_norm_precision,
    statistics_dtype,
    wide,
)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The specification, in plain differentiable PyTorch at the promoted dtype."""
    total = x if residual is None else x + residual
    dtype = total.dtype
    affine = [None if p is None else p.to(dtype) for p in (weight, bias)]
    return F.layer_norm(total, (total.shape[-1],), *affine, eps), total


def _forward_ref(x, residual, weight, bias, eps):
    total = x if residual is None else x + residual
    t = wide(total)
    mean = t.mean(-1)
    rstd = torch.rsqrt(t.var(-1, unbiased=False) + eps)
    normed = (t - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * wide(weight)
    if bias is not None:
        normed = normed + wide(bias)
    kept = total if residual is not None else total.new_empty(0)
    return normed.to(total.dtype), kept, mean, rstd


def _backward_ref(grad_normed, grad_total, total, weight, mean, rstd, has_bias):
    g = wide(grad_normed)
    xhat = (wide(total) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    gw = g * wide(weight)
    dx = gw - gw.mean(-1, keepdim=True) - xhat * (gw * xhat).mean(-1, keepdim=True)
    dx = dx * rstd.unsqueeze(-1)
    if grad_total is not None:
        dx = dx + wide(grad_total)
    hidden = total.shape[-1]
    dweight = (g * xhat).reshape(-1, hidden).sum(0).to(weight.dtype)
    dbias = g.reshape(-1, hidden).sum(0) if has_bias else g.new_empty(0)
    return dx.to(total.dtype), dweight, dbias.to(weight.dtype)


def _forward_fake(x, residual, weight, bias, eps):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(x.shape, dtype=dtype)
    kept = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    stats = [x.new_empty(x.shape[:-1], dtype=statistics_dtype(normed)) for _ in range(2)]
    return normed, kept, *stats


def _backward_fake(grad_normed, grad_total, total, weight, mean, rstd, has_bias):
    dbias = weight.new_empty(weight.shape if has_bias else 0)
    return total.new_empty(total.shape), weight.new_empty(weight.shape), dbias


def _save(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)


def _differentiate(ctx, bwd, grad_normed, grad_total, _mean, _rstd):
    total, weight, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if residual_dtype is None:
        grad_total = None
    dweight = dbias = None
    dx = grad_total
    if grad_normed is not None:
        has_bias = ctx.bias_dtype is not None
        dx, dweight, dbias = bwd(grad_normed, grad_total, total, weight, mean, rstd, has_bias)
        dbias = dbias.to(ctx.bias_dtype) if has_bias else None
    if dx is None:
        return None, None, None, None, None
    dresidual = None if residual_dtype is None else dx.to(residual_dtype)
    return dx.to(x_dtype), dresidual, dweight, dbias, None


define(
    OpSpec(
        name="add_layer_norm",
        forward="(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps)"
        " -> (Tensor normed, Tensor total, Tensor mean, Tensor rstd)",
        backward="(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight,"
        " Tensor mean, Tensor rstd, bool has_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=_forward_ref,
        backward_ref=_backward_ref,
        save=_save,
        differentiate=_differentiate,
        autocast=layer_norm_precision,
    )
)


def _inplace_ref(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float):
    normed, total, *_ = _forward_ref(x, residual, weight, bias, eps)
    x.copy_(normed)
    residual.copy_(total)


define(
    OpSpec(
        name="add_layer_norm_inplace",
        forward="(Tensor(a!) x, Tensor(b!) residual, Tensor weight, Tensor? bias, float eps) -> ()",
        forward_fake=lambda x, residual, weight, bias, eps: None,
        forward_ref=_inplace_ref,
    )
)


def add_layer_norm_inplace(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` into the memory of ``x`` and ``residual``, where that can be.

    For tensors that nobody else reads: on a CPU, without gradients, of one dtype, contiguous, they
    become what is returned; else they stay and new ones are made.

    Args, returns, raises: as :func:`add_layer_norm`; residual is not None.
    """
    if (
        torch.is_grad_enabled()
        or x.dtype not in KERNEL_DTYPES
        or x.dtype != residual.dtype
        or any(p is not None and p.dtype not in KERNEL_DTYPES for p in (weight, bias))
        or x.shape != residual.shape
        or not (x.is_contiguous() and residual.is_contiguous())
        or not runs_on_cpu(x, residual)
        or unavailable("add_layer_norm_inplace", "cpu") is not None
    ):
        return add_layer_norm(x, residual, weight, bias, eps)
    torch.ops.fastenc.add_layer_norm_inplace_fwd(x, residual, weight, bias, eps)
    return x, residual


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``total = x + residual``; returns ``(LayerNorm(total) * weight + bias, total)``.

    Args:
        x: (..., hidden). residual: the same shape, or None (then ``total`` is ``x`` itself).
        weight, bias: (hidden,); bias may be None. Dtypes may differ from those of x and residual.
        eps: added to the variance.

    Returns:
        (normed, total), both in the promoted dtype of ``x`` and ``residual``; under CUDA autocast
        in float32, as torch's layer_norm.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.floating("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected (..., hidden) with hidden >= 1, got {tuple(x.shape)}")
    if residual is not None:
        _checks.floating("residual", residual)
        _checks.same_device("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(
                f"residual: expected the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if name == "bias" and parameter is None:
            continue
        _checks.floating(name, parameter, 1)
        _checks.same_device(name, parameter, "x", x)
        if parameter.shape[0] != x.shape[-1]:
            raise ValueError(f"{name}: expected ({x.shape[-1]},), got {tuple(parameter.shape)}")
    widest = x if residual is None or x.dtype == torch.float64 else residual
    weight, bias = at_most_float32(weight, widest), at_most_float32(bias, widest)
    normed, total, _, _ = select("add_layer_norm", widest)(x, residual, weight, bias, eps)
    return normed, (x if residual is None else total)
