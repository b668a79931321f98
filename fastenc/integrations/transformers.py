"""transformers: every supported model inside an object changes its class to fastenc's subclass."""

from __future__ import annotations

from torch import nn

from fastenc.models._takeover import give_back, is_ours, our_class, supported, take_over
from fastenc.nn import linear
from fastenc.ops._registry import note_fallback


def accelerate(obj: nn.Module, prepack: bool = False) -> nn.Module:
    """Take over every supported transformers model in ``obj``, itself included."""
    found = False
    for module in obj.modules():
        found = found or is_ours(module)
        cls = our_class(type(module))
        if cls is None:
            continue
        found = True
        if "forward" in module.__dict__:
            note_fallback(f"{type(module).__name__}: its forward was replaced, it stays as it is")
        else:
            take_over(module, cls)
    if not found:
        raise TypeError(
            f"accelerate: {type(obj).__module__}.{type(obj).__qualname__} contains none of "
            f"transformers' {', '.join(supported())}"
        )
    return linear.prepack(obj) if prepack else obj


def restore(obj: nn.Module) -> nn.Module:
    """Give every model in ``obj`` that accelerate took over its own class back."""
    for module in obj.modules():
        give_back(module)
    return linear.unpack(obj)
