"""From a class of transformers to fastenc's subclass of it, and back.

fastenc's ModernBertModel *is* transformers' with another forward, so a live model is taken over by
changing its class: parameters, names, config, hooks and registered state stay as they are, and
pickle and deepcopy know the class.
"""

from __future__ import annotations

import importlib

from torch import nn

# transformers' modeling file -> the prefix of its classes' names, and the home of fastenc's base
_FILES = {
    "modernbert.modeling_modernbert": ("ModernBert", "fastenc.models.modernbert"),
    "bert.modeling_bert": ("Bert", "fastenc.models.bert"),
    "deberta_v2.modeling_deberta_v2": ("DebertaV2", "fastenc.models.deberta"),
    "roberta.modeling_roberta": ("Roberta", "fastenc.models.roberta"),
    "mpnet.modeling_mpnet": ("MPNet", "fastenc.models.mpnet"),
    "xlm_roberta.modeling_xlm_roberta": ("XLMRoberta", "fastenc.models.roberta"),
}
_HEADS = "fastenc.models.heads"
_MARK = "_fastenc_taken"


def supported() -> list[str]:
    """The names of the base models of transformers that fastenc takes over."""
    return [f"{prefix}Model" for prefix, _ in _FILES.values()]


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastenc.models.")


def our_class(cls: type) -> type | None:
    """fastenc's subclass of transformers' ``cls``, or None."""
    prefix, home = _FILES.get(cls.__module__.removeprefix("transformers.models."), ("", ""))
    if not home:
        return None
    if cls.__name__ != f"{prefix}Model":
        home = _HEADS
    ours = getattr(importlib.import_module(home), cls.__name__, None)
    return ours if ours is not None and issubclass(ours, cls) and ours is not cls else None


def take_over(module: nn.Module, cls: type) -> None:
    """Change the class of ``module`` to ``cls``, fastenc's subclass of it."""
    module.__class__ = cls
    module.__dict__[_MARK] = True


def was_taken(module: nn.Module) -> bool:
    return module.__dict__.get(_MARK, False)


def give_back(module: nn.Module) -> None:
    """Undo :func:`take_over`; a module that was not taken over is left alone."""
    if module.__dict__.pop(_MARK, False):
        module.__class__ = next(
            cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.")
        )
