"""The compiled libraries, loaded once: ``fastenc._C`` (CPU and host code) and the CUDA library."""

from __future__ import annotations

import ctypes
import glob
import importlib
import itertools
import os
import re
from collections.abc import Sequence

import torch

from fastenc.ops import _gpus

_cpu_reason: str | None = None
_cuda_reason: str | None = None
_cuda: ctypes.CDLL | None = None
_gpus_served = _gpus.Gpus()

try:
    _C = importlib.import_module("fastenc._C")
except ImportError as error:
    _C = None
    _cpu_reason = f"the C++ library is not built: {error}"


# csrc/cuda/launch_counts.cu
_ARCHS = re.compile(rb"fastenc-cuda-archs:([0-9af;]+)\0")
_TOOLKIT = re.compile(rb"fastenc-cuda-toolkit:(\d+)\0")


def arch_served(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs``, as nvcc names them, runs on a GPU of ``capability``.

    "90a" runs on that chip alone, "100f" on later minors of its family; of the others, setup.py
    stores the oldest as PTX too, which every later GPU can compile.
    """
    for arch in archs:
        number = arch.rstrip("af")
        target = (int(number[:-1]), int(number[-1]))
        if arch.endswith("a"):
            served = capability == target
        elif arch.endswith("f"):
            served = capability[0] == target[0] and capability >= target
        else:
            served = capability >= target
        if served:
            return True
    return False


def built_for(path: str) -> tuple[list[str], int | None]:
    """Targets of a CUDA library, and the major version of the toolkit whose runtime is linked into
    it; read from the file, since loading it would register it."""
    with open(path, "rb") as file:
        content = file.read()
    archs, toolkit = _ARCHS.search(content), _TOOLKIT.search(content)
    return archs[1].decode().split(";") if archs else [], int(toolkit[1]) if toolkit else None


def gpu_capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capability of each GPU that the CUDA library was loaded for."""
    return _gpus_served.capabilities


def shared_memory() -> int:
    """KiB that a block may use on each of those GPUs."""
    return min(map(_gpus.shared_memory, gpu_capabilities()), default=_gpus.shared_memory((9, 0)))


def _open_cuda(path: str) -> ctypes.CDLL:
    """Loading registers the kernels with torch; the handle is for the launch counts."""
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.fastenc_cuda_launch_count.restype = ctypes.c_char_p
    library.fastenc_cuda_launch_count.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    return library


def _unfit(archs: list[str], toolkit: int | None, gpus: _gpus.Gpus) -> str | None:
    """Why a library built for that cannot serve every one of these GPUs."""
    for major, minor in gpus.capabilities:
        if not arch_served(archs, (major, minor)):
            built = ", ".join(f"sm_{arch}" for arch in archs)
            return f"the CUDA library is built for {built}; a GPU here is sm_{major}{minor}"
    if gpus.driver is not None and toolkit is not None and gpus.driver[0] < toolkit:
        newest = ".".join(map(str, gpus.driver))
        return f"the CUDA library is built with CUDA {toolkit}; the driver here serves {newest}"
    return None


def _load_cuda() -> str | None:
    """Load the CUDA library where a GPU can use it; returns why not, if so.

    Only a library that serves is loaded: its kernels take the CUDA key of ``fastenc``, which
    Triton's kernels get otherwise.
    """
    global _cuda, _gpus_served
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = sorted(glob.glob(os.path.join(here, "_cuda*.so")))
    if not paths:
        return "the CUDA library is not built (nvcc was not found, or FASTENC_CUDA=0)"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if torch.cuda.device_count() == 0:  # is_available() would initialise CUDA
        return "no GPU is available"
    built = built_for(paths[0])
    gpus = _gpus.installed()
    if gpus is None or _unfit(*built, gpus):  # the unfit one may be hidden from this process
        gpus = _gpus.visible()
    reason = _unfit(*built, gpus)
    if reason is not None:
        return reason
    try:
        _cuda = _open_cuda(paths[0])
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    _gpus_served = gpus
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
