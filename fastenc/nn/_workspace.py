"""Memory that the layers of a forward share.

A forward without gradients makes the same few tensors in every layer. Made anew each time, large
ones cost page faults (a twentieth of a product's time) and, as they wander through malloc's heap,
several times their size in peak memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Buffers by name. What :meth:`take` gives is overwritten by who takes the same name next."""

    def __init__(self, like: Tensor) -> None:
        self._like = like.detach()
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of ``shape``, of the dtype and on the device of ``like``."""
        size = torch.Size(shape).numel()
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = self._like.new_empty(size)
        return kept[:size].view(shape)
