"""What was made of weights, kept while they are what they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """``value``, made of ``weights`` under the circumstances ``also``.

    Changes in place are seen by torch's version counters (not those through ``weight.data``), other
    weights by their addresses. The old ones' memory is held, or another could get its address.
    """

    def __init__(self, value: T, weights: Sequence[Tensor], *also: object) -> None:
        self.value = value
        self._state = _state(weights, also)
        self._held = [w.detach() for w in weights]

    def is_of(self, weights: Sequence[Tensor], *also: object) -> bool:
        return self._state == _state(weights, also)


def _state(weights: Sequence[Tensor], also: tuple) -> tuple:
    return also, *((w.data_ptr(), w._version, w.dtype, w.device, w.shape) for w in weights)
