"""The compiled libraries, loaded once: ``fastenc._C`` (CPU and host code) and the CUDA library."""

from __future__ import annotations

import ctypes
import glob
import importlib
import itertools
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


OLDEST_ARCH = (8, 0)  # of the CUDA library: 16-bit arithmetic and cp.async begin there


def _oldest_gpu() -> tuple[int, int] | None:
    """Compute capability of the oldest visible GPU, None where the driver does not say.

    Asked of the driver itself: torch.cuda.get_device_capability would initialise CUDA in torch,
    after which a forked process can no longer use it.
    """
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    found = []
    for device in range(count.value):
        numbers = []
        for attribute in (major, minor):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return None
            numbers.append(value.value)
        found.append(tuple(numbers))
    return min(found, default=None)


def _open_cuda(path: str) -> ctypes.CDLL:
    """Loading registers the kernels with torch; the handle is for the launch counts."""
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.fastenc_cuda_launch_count.restype = ctypes.c_char_p
    library.fastenc_cuda_launch_count.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    return library


def _load_cuda() -> str | None:
    """Load the CUDA library where a GPU can use it; returns why not, if so.

    Only a library that serves is loaded: its kernels take the CUDA key of ``fastenc``, which
    Triton's kernels get otherwise.
    """
    global _cuda
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = sorted(glob.glob(os.path.join(here, "_cuda*.so")))
    if not paths:
        return "the CUDA library is not built (nvcc was not found, or FASTENC_CUDA=0)"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "no GPU is available"
    oldest = _oldest_gpu()
    if oldest is not None and oldest < OLDEST_ARCH:
        return f"the CUDA library serves sm_80 and later, a GPU here is sm_{oldest[0]}{oldest[1]}"
    try:
        _cuda = _open_cuda(paths[0])
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


_cuda_reason = _load_cuda()


def cpu_reason() -> str | None:
    return _cpu_reason


def cuda_reason() -> str | None:
    return _cuda_reason


def serves_cuda(op: str) -> bool:
    """Whether the CUDA library holds ``op`` (a name such as "geglu_fwd") and a GPU is there."""
    name = f"fastenc_cuda::{op}"
    return (
        _cuda_reason is None
        and torch._C._dispatch_has_kernel(name)  # the question below raises for an unknown name
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    )


def launch_counts() -> dict[tuple[str, str], int]:
    """Launches of C++ kernels since the process began: {(op, backend): count}."""
    counts: dict[tuple[str, str], int] = {}
    if _C is not None:
        counts.update({(op, "cpu"): n for op, n in _C.launch_counts().items()})
    if _cuda is not None:
        launches = ctypes.c_int64()
        for i in itertools.count():
            name = _cuda.fastenc_cuda_launch_count(i, ctypes.byref(launches))
            if name is None:
                break
            key = (name.decode(), "cuda")
            counts[key] = counts.get(key, 0) + launches.value
    return counts
