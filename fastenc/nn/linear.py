"""Linear layers on weights packed once into oneDNN's blocked layout, for inference on a CPU.

torch's ``F.linear`` packs the weight again in every call (in fp32 through MKL). Packed once, the
same product is faster, most of all in bf16 and for few rows: ``bench/bench_linear.py`` measures it.
The packed copy costs the memory of the weight again.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastenc.ops._registry import note_fallback

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Tensor | None]] = (
    weakref.WeakKeyDictionary()
)


class PrepackedLinear(nn.Linear):
    """``nn.Linear`` whose weight is packed at its first use without gradients, on a CPU.

    The packed copy follows the weight: it is made again when the weight was changed in place (seen
    by torch's version counter; changes through ``weight.data`` are not seen), moved or converted.
    With gradients, under autocast or compilation, or on another device it is a plain ``nn.Linear``.
    """

    def forward(self, x: Tensor) -> Tensor:
        packed = self._weight_for(x)
        if packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")

    def _weight_for(self, x: Tensor) -> Tensor | None:
        w = self.weight
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or x.device.type != "cpu"
            or w.device.type != "cpu"
            or x.dtype != w.dtype
            or x.numel() == 0
            or w.is_inference()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        key = (w.data_ptr(), w._version, w.dtype, w.shape)
        found = _packed.get(self)
        if found is None or found[0] != key:
            found = _packed[self] = (key, _pack(w))
        return found[1]


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where this processor or dtype has none."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.enabled:
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        note_fallback(f"prepacked linear: {weight.dtype} weights stay as they are ({error})")
        return None


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
