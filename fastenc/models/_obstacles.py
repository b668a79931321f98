"""What keeps a transformers module from the packed path: read before every forward.

The packed path calls linear layers, embeddings, dropouts and activations as modules (adapters on
them act as they do in transformers) and replaces the layers around them. Whatever else was put into
or onto those layers would be skipped, so it is found here and transformers' own forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_HARMLESS = frozenset(
    # transformers' recorder of hidden states, idle on the packed path; and the hook by which
    # gradient checkpointing and adapters make the embeddings' output require a gradient
    {"output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad"}
)

Slots = Mapping[str, tuple[type, ...]]


def obstacle(root: nn.Module, slots: Slots) -> str | None:
    """Why the packed path would not do what ``root`` does, or None.

    Args:
        root: a base model.
        slots: the exact types expected under each child name that the packed path replaces; "[]"
            stands for the members of every ModuleList.
    """
    for name, child in root._modules.items():
        if child is None:
            continue
        expected = slots.get("[]" if type(root) is nn.ModuleList else name)
        if expected is not None and type(child) not in expected:
            return f"{name} is a {type(child).__name__}"
        if expected is not None and "forward" in child.__dict__:
            return f"the forward of {name} was replaced"
        for kind in _HOOKS:
            hooks = child.__dict__[kind]
            if hooks and not all(_harmless(hook) for hook in hooks.values()):
                return f"hooks on inner modules ({name or type(child).__name__})"
        if child._modules:
            found = obstacle(child, slots)
            if found is not None:
                return found
    return None


def traced() -> str | None:
    """What makes a graph of this call that would keep its lengths, or has no op of fastenc's."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    return "torch.onnx.export" if in_onnx_export() else None


def in_onnx_export() -> bool:
    tracing = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return tracing and torch.onnx.is_in_onnx_export()


def _harmless(hook: object) -> bool:
    return getattr(hook, "__name__", None) in _HARMLESS
