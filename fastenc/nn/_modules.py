"""Whether calling a module is its forward and nothing else."""

from __future__ import annotations

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
