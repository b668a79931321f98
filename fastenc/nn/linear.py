"""Linear layers on a CPU: this library's matrix product, and weights packed once for oneDNN.

torch's ``F.linear`` takes MKL for fp32. With AVX2 :func:`linear` and :func:`product` take the op of
:mod:`fastenc.ops.linear`: the same rounding error, on an AMD EPYC (Zen 4) 1.05 to 1.4 times as fast
for many rows and 1.2 to 3 times for few, gradients too. On an Intel Xeon (Sapphire Rapids), for
which MKL keeps its best kernels, it is 0.93 to 0.96 times as fast for many rows and 1 to 3 times
for few (``bench/bench_linear.py``), and a model is faster for what the op does besides: it gates,
and writes to memory that is there; a product whose gradients are wanted is torch's there.
``FASTENC_LINEAR=torch`` leaves every product to torch, ``FASTENC_LINEAR=fastenc`` none that the op
serves. Where the user lets fp32 products be rounded to bf16
(``torch.set_float32_matmul_precision("medium")``), they are torch's.

:func:`prepack` keeps a copy of the weight in oneDNN's blocked layout, at the memory of the weight
again: in bf16, and in fp32 where the product above is not taken (no AVX2, or
``FASTENC_LINEAR=torch``). oneDNN adds up longer runs: its fp32 error is 1.4 times MKL's at 384 and
768 inputs and 2.2 times at 1152 and more.
"""

from __future__ import annotations

import functools
import os
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastenc.nn._kept import Kept
from fastenc.nn._modules import is_unhooked
from fastenc.ops import _library
from fastenc.ops._registry import note_fallback, runs_on_cpu, unavailable
from fastenc.ops.geglu import geglu

_packed: weakref.WeakKeyDictionary[nn.Module, Kept[Tensor | None]] = weakref.WeakKeyDictionary()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a plain ``nn.Linear`` takes :func:`product`, with its gradients.

    Args:
        layer: any module; what is not exactly an ``nn.Linear``, has hooks or another ``forward``,
            is called.
        x: (..., in_features).

    Returns:
        (..., out_features).
    """
    if not torch.compiler.is_compiling() and type(layer) is nn.Linear and _is_plain(layer):
        return product(x, layer.weight, layer.bias)
    return layer(x)


def gated(layer: nn.Module, x: Tensor, activation: str) -> Tensor:
    """``geglu(linear(layer, x), activation)``; without gradients, for more than a few rows of fp32
    on a CPU, in one kernel that never holds the product whole.

    Args:
        layer: any module from (..., in_features) to (..., 2 I), as for :func:`linear`.
        x: (..., in_features).
        activation: as for :func:`fastenc.geglu`.

    Returns:
        (..., I).
    """
    if (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(layer) in (nn.Linear, PrepackedLinear)
        and _is_plain(layer)
        and x.numel() >= FEW_ROWS * x.shape[-1]
        and is_served(x, layer.weight, layer.bias)
    ):
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(rows.shape[0], layer.weight.shape[0] // 2)
        torch.ops.fastenc.linear_geglu_fwd(rows, layer.weight, layer.bias, activation, y)
        return y.view(*x.shape[:-1], -1)
    return geglu(linear(layer, x), activation)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether calling the layer is its product and nothing else."""
    return type(layer.weight) is nn.Parameter and is_unhooked(layer)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``F.linear(x, weight, bias)``, differentiable; fp32 on a CPU by fastenc's product.

    Args:
        x: (..., K).
        weight: (N, K), of any strides.
        bias: (N,).
        out: (rows of x, N), contiguous fp32: memory for the result, taken without gradients
            where fastenc's product runs.

    Returns:
        (..., N).
    """
    if torch.compiler.is_compiling():  # before what it cannot trace
        return F.linear(x, weight, bias)
    gradients = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    plain = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    if not plain or not is_served(x, weight, bias, gradients=gradients):
        many = x.device.type == "cpu" and x.numel() >= FEW_ROWS * x.shape[-1]
        if many and not torch.is_grad_enabled():
            weight = weight.contiguous()  # MKL is a third slower on a weight with gaps
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if gradients:
        y = _Product.apply(rows, weight, bias)
    else:
        y = _run(rows, weight, bias, None if torch.is_grad_enabled() else out)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    size = x.shape[0], weight.shape[0]
    y = out if _fits(out, *size) else x.new_empty(size)
    torch.ops.fastenc.linear_fwd(x, weight, bias, y)
    return y


def _fits(out: Tensor | None, rows: int, columns: int) -> bool:
    return (
        out is not None
        and out.shape == (rows, columns)
        and out.dtype == torch.float32
        and out.is_contiguous()
        and runs_on_cpu(out)
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _run(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = product(grad, weight.t())
        if ctx.needs_input_grad[1]:
            dw = product(grad.t(), x.t())
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db


# Under so many rows the gate is a kernel of its own, and MKL does not mind a weight with gaps.
FEW_ROWS = 64


def is_served(x: Tensor, *parameters: Tensor | None, gradients: bool = False) -> bool:
    """Whether fastenc's product is to be taken, and is for these tensors."""
    tensors = (x, *(p for p in parameters if p is not None))
    return (
        prefers_own(gradients)
        and all(t.dtype == torch.float32 for t in tensors)
        and x.dim() > 0
        and x.numel() > 0
        and runs_on_cpu(*tensors)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    )


@functools.cache
def prefers_own(gradients: bool = False) -> bool:
    """Whether fp32 products on this machine's CPU are fastenc's unless somebody else is asked for.

    Args:
        gradients: of products whose gradients are wanted.

    Raises:
        ValueError: FASTENC_LINEAR is neither "torch", "fastenc" nor empty.
    """
    asked = os.environ.get("FASTENC_LINEAR", "")
    if asked not in ("", "torch", "fastenc"):
        raise ValueError(f"FASTENC_LINEAR: expected torch or fastenc, got {asked!r}")
    if unavailable("linear", "cpu") is not None or asked == "torch":
        return False
    if asked == "fastenc":
        return True
    vectors = _library._C.cpu_isa() != "portable"
    return vectors and not (gradients and _library._C.cpu_is_intel())


class PrepackedLinear(nn.Linear):
    """``nn.Linear`` whose weight is packed at its first use without gradients, on a CPU.

    The packed copy follows the weight: it is made again when the weight was changed in place (seen
    by torch's version counter, and after any optimizer's step; changes through ``weight.data`` are
    not seen), moved, converted or replaced.
    With gradients, under autocast or compilation, or on another device it is as :func:`linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        packed = self._weight_for(x)
        if packed is None:
            return product(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")

    def _weight_for(self, x: Tensor) -> Tensor | None:
        w = self.weight
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # before what it cannot trace
            or not (x.device.type == w.device.type == "cpu" and x.dtype == w.dtype)
            or x.numel() == 0
            or not torch.backends.mkldnn.enabled
            or torch.is_autocast_enabled("cpu")
            or w.is_inference()
            or (w.dtype == torch.float32 and prefers_own())
        ):
            return None
        found = _packed.get(self)
        if found is None or not found.is_of([w]):
            found = _packed[self] = Kept(_pack(w), [w])
        return found.value


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
