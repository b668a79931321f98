"""Whether calling a module is its forward and nothing else; evaluation mode for a while."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn
from torch.nn.modules import module as torch_modules


def is_unhooked(module: nn.Module) -> bool:
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not torch_modules._has_any_global_hook()
    )


_modes: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()
_modes_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` until the last of all threads inside leaves; then every flag as it was."""
    with _modes_lock:
        state = _modes.setdefault(model, [0, []])
        if state[0] == 0:
            state[1] = [m for m in model.modules() if m.training]
            if state[1]:
                model.eval()
        state[0] += 1
    try:
        yield
    finally:
        with _modes_lock:
            state[0] -= 1
            if state[0] == 0:
                for module in state[1]:
                    module.training = True
                del _modes[model]
