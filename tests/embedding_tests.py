"""Shared by the tests of embeddings: the parity rule against the library they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastenc.testing import assert_parity


def as_tensor(x: Any) -> Tensor:
    """Arrays, tensors, or a list of either."""
    if isinstance(x, list):
        return torch.stack([as_tensor(row) for row in x])
    return torch.as_tensor(x).detach()


@dataclass(frozen=True)
class Expected:
    """Another library's vectors (n, ...): ``plain`` as it computes them, ``exact`` in float64."""

    plain: Tensor
    exact: Tensor

    @classmethod
    def of(cls, model: torch.nn.Module, embed: Callable[[Any], Any]) -> Expected:
        """``embed(model)``, and the same of a float64 copy of the model."""
        return cls(as_tensor(embed(model)), as_tensor(embed(copy.deepcopy(model).double())))

    def check(self, found: Any, rows: int | slice = slice(None), name: str = "vectors") -> None:
        """The parity rule; ``found`` stands for these rows, plain's error is its worst of all."""
        found = as_tensor(found)
        assert found.dtype == self.plain.dtype and found.shape == self.plain[rows].shape
        whole = self.plain.clone()
        whole[rows] = found
        assert_parity(name, whole, self.plain, self.exact)
