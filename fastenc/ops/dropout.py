"""Dropout: ``x keep / (1 - p)``, whose mask is a function of a seed and of each element's index.

x of any shape, seed (1,) int64. torch's dropout on a CPU draws its mask from one serial generator,
at several nanoseconds an element, and keeps it for the backward; here every thread makes its part
of the mask, forward and backward (Philox: ops/_philox.py). ``fastenc.nn.dropout`` has its caller.
"""

from __future__ import annotations

from torch import Tensor

from fastenc.ops._philox import keep_elements
from fastenc.ops._registry import OpSpec, define
from fastenc.ops._rules import wide


def dropout_ref(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """The specification, in plain differentiable PyTorch at the dtype of ``x``."""
    keep = keep_elements(x.numel(), dropout_p, seed).view(x.shape)
    return x * keep.to(x.dtype) * (1 / (1 - dropout_p))


def _kernel_ref(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return dropout_ref(wide(x), dropout_p, seed).to(x.dtype)


def _fake(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx, bwd, grad):
    (seed,) = ctx.saved_tensors
    return (None if grad is None else bwd(grad, ctx.dropout_p, seed)), None, None


define(
    OpSpec(
        name="dropout",
        forward="(Tensor x, float dropout_p, Tensor seed) -> Tensor",
        backward="(Tensor grad, float dropout_p, Tensor seed) -> Tensor",
        forward_fake=_fake,
        backward_fake=_fake,
        forward_ref=_kernel_ref,
        backward_ref=_kernel_ref,
        save=_save,
        differentiate=_differentiate,
    )
)
