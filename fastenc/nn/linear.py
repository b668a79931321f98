"""Linear layers on a CPU: weights packed once for oneDNN, and its product where it is asked for.

torch's ``F.linear`` takes MKL for fp32, which keeps its best kernels for Intel's processors: on an
AMD EPYC (Zen 4) oneDNN's product of the same two matrices is 1.04 to 1.26 times as fast from 128
rows on and twice as fast for one to four (AVX2 and AVX-512, 2 threads). It sums in longer runs,
though: its error is 1.4 times MKL's at 384 and 768 inputs and 2.2 times at 1152 and more (rms),
past the bound of this library's kernels. So it is taken only where it is asked for:
:func:`prepack` keeps a copy of the weight in oneDNN's blocked layout, at the memory of the weight
again, fastest for few rows and in bf16; ``FASTENC_ONEDNN=1`` lets :func:`linear` take it without a
copy, also for the gradient of the input. ``bench/bench_linear.py`` measures all three.
"""

from __future__ import annotations

import functools
import os
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastenc.ops._registry import note_fallback

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Tensor | None]] = (
    weakref.WeakKeyDictionary()
)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; under ``FASTENC_ONEDNN=1`` a plain fp32 ``nn.Linear`` takes oneDNN's product,
    with its gradients.

    Args:
        layer: any module; what is not exactly an ``nn.Linear``, has hooks or another ``forward``,
            is called.
        x: (..., in_features).

    Returns:
        (..., out_features).
    """
    if (
        not torch.compiler.is_compiling()
        and type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and not torch_modules._has_any_global_hook()
    ):
        return product(x, layer.weight, layer.bias)
    return layer(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``; in fp32 on a CPU by oneDNN under ``FASTENC_ONEDNN=1``.

    A weight with gaps (a slice of columns) is copied for many rows: MKL's product is a third slower
    on it, and oneDNN falls to a reference loop.
    """
    if torch.compiler.is_compiling():  # before what it cannot trace
        return F.linear(x, weight, bias)
    many = x.numel() >= _COPY_FROM_ROWS * x.shape[-1]
    if many and x.device.type == "cpu" and not torch.is_grad_enabled():
        weight = weight.contiguous()
    if (
        not _plain_on_cpu(x, weight)
        or x.dtype != torch.float32
        or not (weight.is_contiguous() or many)
        or torch._C._are_functorch_transforms_active()
        or not prefers_onednn()
    ):
        return F.linear(x, weight, bias)
    x, weight = x.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _Product.apply(x, weight, bias)
    return _product(x, weight, bias)


class _Product(torch.autograd.Function):
    """The product and its gradients; the weight's, a product over the rows, is MKL's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # the gradient is to be differentiated again
                dx = grad @ weight
            else:
                dx = _product(grad.contiguous(), weight.t(), None)
        if ctx.needs_input_grad[1]:
            dw = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db


_COPY_FROM_ROWS = 64


@functools.cache
def prefers_onednn() -> bool:
    """Whether fp32 products are oneDNN's: ``FASTENC_ONEDNN=1``, read once."""
    return os.environ.get("FASTENC_ONEDNN") == "1" and torch.backends.mkldnn.is_available()


def _plain_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of one dtype on a CPU, without autocast, is all that is asked for."""
    return (
        x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PrepackedLinear(nn.Linear):
    """``nn.Linear`` whose weight is packed at its first use without gradients, on a CPU.

    The packed copy follows the weight: it is made again when the weight was changed in place (seen
    by torch's version counter, and after any optimizer's step; changes through ``weight.data`` are
    not seen), moved or converted.
    With gradients, under autocast or compilation, or on another device it is as :func:`linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        packed = self._weight_for(x)
        if packed is None:
            return product(x, self.weight, self.bias)
        return _product(x, packed, self.bias)

    def _weight_for(self, x: Tensor) -> Tensor | None:
        w = self.weight
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # before what it cannot trace
            or not _plain_on_cpu(x, w)
            or w.is_inference()
        ):
            return None
        key = (w.data_ptr(), w._version, w.dtype, w.shape)
        found = _packed.get(self)
        if found is None or found[0] != key:
            found = _packed[self] = (key, _pack(w))
        return found[1]


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where this processor or dtype has none."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    count_fused_steps()
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        note_fallback(f"prepacked linear: {weight.dtype} weights stay as they are ({error})")
        return None


@functools.cache
def count_fused_steps() -> None:
    """From now on a fused optimizer's step moves the version counters, as other optimizers' do."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            changed = [p for p in group["params"] if p.grad is not None and not p.is_inference()]
            torch.autograd.graph.increment_version(changed)


def prepack(module: nn.Module) -> nn.Module:
    """Make every plain ``nn.Linear`` in ``module`` a :class:`PrepackedLinear`, in place."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = PrepackedLinear
    return module


def unpack(module: nn.Module) -> nn.Module:
    """Undo :func:`prepack` and free the packed copies."""
    for part in module.modules():
        if type(part) is PrepackedLinear:
            part.__class__ = nn.Linear
            _packed.pop(part, None)
    return module
