"""Autocast rules and dtype rules shared by the ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """``x`` at the dtype in which the plain PyTorch kernels compute: float32, or float64 kept."""
    return x if x.dtype == torch.float64 else x.float()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of sums and log-sum-exps over ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sequences(cu_seqlens: Tensor) -> Iterator[tuple[int, slice]]:
    """(index, rows) of each packed sequence; reads ``cu_seqlens``."""
    for seq, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        yield seq, slice(start, end)


def at_most_float32(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A float64 table or parameter beside a ``like`` of less, as the kernels compute with it."""
    if x is None or x.dtype != torch.float64 or like.dtype == torch.float64:
        return x
    return x.float()


def autocast_dtype(device: str) -> torch.dtype | None:
    """The lower precision of autocast where it is on for this kind of device."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for ``x``'s kind of device, and casts its dtype."""
    return x.dtype in _CASTABLE and autocast_dtype(x.device.type) is not None


def _cast(value, dtype: torch.dtype):
    castable = isinstance(value, Tensor) and value.dtype in _CASTABLE
    return value.to(dtype) if castable else value


def lower_precision(count: int, *others: int) -> Callable:
    """The first ``count`` arguments, and those at ``others``, run in the autocast dtype, as torch's
    matrix products do."""
    cast = {*range(count), *others}

    def rule(dtype: torch.dtype, device: str, args: tuple) -> tuple:
        return tuple(_cast(a, dtype) if i in cast else a for i, a in enumerate(args))

    return rule


def layer_norm_precision(dtype: torch.dtype, device: str, args: tuple) -> tuple:
    """As torch's layer_norm under autocast: float32 on CUDA, the inputs' own dtypes on CPU."""
    if device == "cpu":
        return args
    return tuple(_cast(arg, torch.float32) for arg in args)
