"""``accelerate`` and ``restore``: take over live objects of other libraries, in place.

A handler is a module with ``accelerate(obj)`` and ``restore(obj)``; it is found by the package that
``type(obj)`` or one of its bases comes from, and imported only then. A plain ``torch.nn.Module`` is
searched for transformers models.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TypeVar

from torch import nn

from fastenc.integrations import _on_import

T = TypeVar("T")

_HANDLERS = {
    "gliner": "fastenc.integrations.gliner",
    "sentence_transformers": "fastenc.integrations.sentence_transformers",
    "setfit": "fastenc.integrations.setfit",
    "transformers": "fastenc.integrations.transformers",
}


def accelerate(obj: T, *, prepack: bool = False, cuda_graphs: bool = False) -> T:
    """Speed up a live object of another library, in place; the numbers stay the same.

    Parameter names, ``state_dict``, pickling and copying stay as they are; doing it twice does
    nothing more; :func:`restore` undoes it. Where an input needs something that the packed path
    does not do (attentions returned, hooks on inner layers), the object's own code runs, with one
    logged reason (``fastenc.record().fallbacks``).

    Args:
        obj: a transformers model, or any module that contains one; a SentenceTransformer or
            CrossEncoder, whose ``encode`` and ``predict`` then also make batches by tokens; a
            setfit.SetFitModel; a pipeline or Trainer around one of them.
        prepack: also keep the weights of its linear layers in oneDNN's layout where the CPU takes
            its product (:func:`fastenc.nn.prepack`: bf16; fp32 on Intel's processors): faster
            without gradients, at the memory of those weights once more.
        cuda_graphs: run packed forwards without gradients through CUDA graphs, captured once a
            bucket of (tokens, sequences, longest); for small batches, whose launches take longer
            than their kernels. Says so in ``record().fallbacks`` where it cannot.

    Returns:
        ``obj`` itself.

    Raises:
        TypeError: nothing in ``obj`` is known; the message lists what is.
    """
    model = _model_of(obj)
    _handler(model).accelerate(model, prepack=prepack)
    if cuda_graphs:
        _use_cuda_graphs(model, True)
    return obj


def restore(obj: T) -> T:
    """Undo :func:`accelerate`; an object that was not accelerated is left alone.

    Returns:
        ``obj`` itself.
    """
    model = _model_of(obj)
    handler = _handler(model)
    _use_cuda_graphs(model, False)
    handler.restore(model)
    return obj


def _use_cuda_graphs(obj: object, on: bool) -> None:
    """Of every packed model in ``obj``: a module, or an object that holds modules."""
    owners = [obj] if isinstance(obj, nn.Module) else vars(obj).values()
    for owner in owners:
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            if hasattr(module, "use_cuda_graphs"):
                module.use_cuda_graphs(on)


def _model_of(obj: object) -> object:
    """The model that a pipeline or Trainer runs; other objects as they are."""
    model = None if isinstance(obj, nn.Module) else getattr(obj, "model", None)
    is_model = isinstance(model, nn.Module) or hasattr(model, "model_body")  # setfit's is no module
    return model if is_model else obj


def _handler(obj: object) -> ModuleType:
    is_module = isinstance(obj, nn.Module)
    for cls in type(obj).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in _HANDLERS and (is_module or package == "setfit"):
            return importlib.import_module(_HANDLERS[package])
    if is_module:
        return importlib.import_module(_HANDLERS["transformers"])
    raise TypeError(
        f"accelerate: expected a torch.nn.Module or a model of {', '.join(sorted(_HANDLERS))}, "
        f"got {type(obj).__module__}.{type(obj).__qualname__}"
    )


_on_import.register()
