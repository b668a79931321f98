"""transformers: live models are taken over by changing their class to fastenc's subclass of it.

fastenc's ModernBertModel *is* transformers' with another forward, so nothing but the class changes:
parameters, names, config, hooks and registered state stay, and pickle and deepcopy know the class.
"""

from __future__ import annotations

import importlib

from torch import nn

from fastenc.ops._registry import note_fallback

_PACKED = {
    "modernbert.modeling_modernbert": ("fastenc.models.modernbert", ("ModernBertModel",)),
    "bert.modeling_bert": ("fastenc.models.bert", ("BertModel",)),
}
_MARK = "_fastenc_accelerated"


def _packed_class(cls: type) -> type | None:
    """fastenc's subclass of transformers' ``cls``, or None."""
    home, names = _PACKED.get(cls.__module__.removeprefix("transformers.models."), ("", ()))
    if cls.__name__ not in names:
        return None
    return getattr(importlib.import_module(home), cls.__name__)


def accelerate(obj: nn.Module) -> nn.Module:
    """Take over every supported transformers model in ``obj``, itself included."""
    found = False
    for module in obj.modules():
        packed = _packed_class(type(module))
        if packed is None:
            found = found or getattr(module, _MARK, False) or _is_packed(module)
        elif "forward" in module.__dict__:
            found = True
            note_fallback(f"{type(module).__name__}: its forward was replaced, it stays as it is")
        else:
            found = True
            module.__class__ = packed
            module.__dict__[_MARK] = True
    if not found:
        known = ", ".join(name for _, names in _PACKED.values() for name in names)
        raise TypeError(
            f"accelerate: {type(obj).__module__}.{type(obj).__qualname__} contains none of "
            f"transformers' {known}"
        )
    return obj


def restore(obj: nn.Module) -> nn.Module:
    """Give every model in ``obj`` that accelerate took over its own class back."""
    for module in obj.modules():
        if module.__dict__.pop(_MARK, False):
            module.__class__ = next(
                cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.")
            )
    return obj


def _is_packed(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastenc.models.")
