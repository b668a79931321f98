"""Argument checks of the public ops. Every message says what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from fastenc.ops import _library
from fastenc.ops._registry import debug_checks_enabled
from fastenc.ops._rules import autocasts

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, x: object, ndim: int | tuple[int, ...] | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if ndim is not None and x.dim() not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")


def floating(name: str, x: object, ndim: int | tuple[int, ...] | None = None) -> None:
    tensor(name, x, ndim)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def same_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(
            f"{name}: expected the device of {reference_name} ({reference.device}), got {x.device}"
        )


def same_dtype(
    name: str, x: Tensor, reference_name: str, reference: Tensor, cast: bool = True
) -> None:
    """``cast``: autocast gives both its dtype where it is on, and they may differ before."""
    if x.dtype != reference.dtype and not (cast and autocasts(x) and autocasts(reference)):
        raise TypeError(
            f"{name}: expected the dtype of {reference_name} ({reference.dtype}), got {x.dtype}"
        )


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def readable(x: Tensor) -> bool:
    """Whether the contents of ``x`` may be read: eager, and on the CPU or under debug_checks."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and (x.device.type == "cpu" or debug_checks_enabled())
    )


def cu_seqlens(
    name: str, cu: object, total: int, like: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """``cu``, contiguous: (num_seqs + 1,) int32 on ``like``'s device, 0 to ``total``, no entry less
    than the one before."""
    tensor(name, cu, 1)
    if cu.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {cu.dtype}")
    if cu.shape[0] < 1:
        raise ValueError(f"{name}: expected num_seqs + 1 >= 1 entries, got none")
    same_device(name, cu, "the packed tensor", like)
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not is_int(max_seqlen)):
        raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
    cu = cu.contiguous()
    if not readable(cu):
        return cu
    edges = cu.tolist()
    if edges[0] != 0 or edges[-1] != total:
        raise ValueError(
            f"{name}: expected to run from 0 to total_tokens = {total}, "
            f"got {edges[0]} to {edges[-1]}"
        )
    longest = 0
    for index in range(len(edges) - 1):
        length = edges[index + 1] - edges[index]
        if length < 0:
            raise ValueError(
                f"{name}: expected non-decreasing entries, got {edges[index]} then "
                f"{edges[index + 1]} at index {index + 1}"
            )
        longest = max(longest, length)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen: the longest sequence has {longest} tokens, got {max_seqlen}")
    return cu


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt))


CPU_HEAD_DIM = 256


def cpu_head_dim(x: Tensor) -> str | None:
    """What the CPU attention kernels do not serve: a head of more than ``CPU_HEAD_DIM``."""
    return _at_most(CPU_HEAD_DIM, x.shape[-1])


def _at_most(most: int, head_dim: int) -> str | None:
    return None if head_dim <= most else f"it serves head_dim up to {most}, got {head_dim}"


def cuda_head_dim(x: Tensor) -> str | None:
    """What the CUDA attention kernels do not serve: a head of more than 128, or of more than 96
    where a block has less shared memory than the backward's 108 KiB (sm_86, sm_89, sm_120)."""
    return _at_most(128 if _library.shared_memory() >= 108 else 96, x.shape[-1])


def cuda_disentangled(x: Tensor) -> str | None:
    """What the CUDA kernels of disentangled attention do not serve: a head of more than 128, or any
    where a block has less shared memory than the backward's 160 KiB (sm_86, sm_89, sm_120)."""
    if _library.shared_memory() < 160:
        return (
            f"it needs 160 KiB of shared memory a block, a GPU here has {_library.shared_memory()}"
        )
    return cuda_head_dim(x)
