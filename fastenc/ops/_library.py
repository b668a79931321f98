"""The compiled libraries, loaded once: ``fastenc._C`` (CPU and host code) and the CUDA library."""

from __future__ import annotations

import ctypes
import glob
import importlib
import os

import torch

_cpu_reason: str | None = None
_cuda_reason: str | None = None
_cuda: ctypes.CDLL | None = None

try:
    _C = importlib.import_module("fastenc._C")
except ImportError as error:
    _C = None
    _cpu_reason = f"the C++ library is not built: {error}"


def _load_cuda() -> str | None:
    """Load the CUDA library where torch has CUDA; returns why it is not there, if so."""
    global _cuda
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = sorted(glob.glob(os.path.join(here, "_cuda*.so")))
    if not paths:
        return "the CUDA library is not built (nvcc was not found, or FASTENC_CUDA=0)"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        torch.ops.load_library(paths[0])
        _cuda = ctypes.CDLL(paths[0])
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    if not torch.cuda.is_available():
        return "no GPU is available"
    return None


_cuda_reason = _load_cuda()


def cpu_reason() -> str | None:
    return _cpu_reason


def cuda_reason() -> str | None:
    return _cuda_reason


def serves_cuda(op: str) -> bool:
    """Whether the CUDA library holds ``op`` (a name such as "geglu_fwd") and a GPU is there."""
    return _cuda_reason is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fastenc_cuda::{op}", "CUDA"
    )


def launch_counts() -> dict[tuple[str, str], int]:
    """Launches of C++ kernels since the process began: {(op, backend): count}."""
    counts: dict[tuple[str, str], int] = {}
    if _C is not None:
        counts.update({(op, "cpu"): n for op, n in _C.launch_counts().items()})
    return counts
