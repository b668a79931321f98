"""Tell transformers of ``attn_implementation="fastenc"`` when, and only when, it is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType


def _attention(module: ModuleType) -> None:
    from fastenc.integrations.attention import NAME, packed_attention

    module.AttentionInterface.register(NAME, packed_attention)


def _masks(module: ModuleType) -> None:
    from fastenc.integrations.attention import NAME, packed_mask

    module.AttentionMaskInterface.register(NAME, packed_mask)


def _modernbert(module: ModuleType) -> None:
    from fastenc.integrations.attention import with_one_mask

    module.ModernBertModel.forward = with_one_mask(module.ModernBertModel.forward)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _attention,
    "transformers.masking_utils": _masks,
    "transformers.models.modernbert.modeling_modernbert": _modernbert,
}


class _AfterImport(MetaPathFinder):
    """Finds the modules of ``_ACTIONS`` as everybody else does, and acts once they are executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _ACTIONS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _ACTIONS[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Act on what is imported already, and on the rest when it is."""
    for name, act in _ACTIONS.items():
        if name in sys.modules:
            act(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport())
