"""What GPUs and which driver are here, asked at import without initialising CUDA: a process that
has initialised it cannot use it in forked children any more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

Capability = tuple[int, int]


@dataclass(frozen=True)
class Gpus:
    """``capabilities`` of the GPUs; ``driver``: the newest CUDA it serves, such as (13, 0)."""

    capabilities: tuple[Capability, ...] = ()
    driver: tuple[int, int] | None = None


def installed() -> Gpus | None:
    """Every GPU of the machine, as NVML says (CUDA_VISIBLE_DEVICES is not heeded); None without."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        found, version = [], _int(nvml.nvmlSystemGetCudaDriverVersion_v2)
        for index in range(_int(nvml.nvmlDeviceGetCount_v2)):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            _succeed(nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
            _succeed(
                nvml.nvmlDeviceGetCudaComputeCapability(
                    handle, ctypes.byref(major), ctypes.byref(minor)
                )
            )
            found.append((major.value, minor.value))
    except OSError:
        return None
    finally:
        nvml.nvmlShutdown()
    return Gpus(tuple(found), _version(version))


def visible() -> Gpus:
    """The GPUs that CUDA shows to this process, as the driver says: this initialises CUDA."""
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        _succeed(driver.cuInit(0))
        found = []
        for device in range(_int(driver.cuDeviceGetCount)):
            found.append(
                (
                    _int(driver.cuDeviceGetAttribute, major, device),
                    _int(driver.cuDeviceGetAttribute, minor, device),
                )
            )
        return Gpus(tuple(found), _version(_int(driver.cuDriverGetVersion)))
    except OSError:
        return Gpus()


def _int(call: Callable, *arguments: int) -> int:
    value = ctypes.c_int()
    _succeed(call(ctypes.byref(value), *arguments))
    return value.value


def _succeed(status: int) -> None:
    if status:
        raise OSError(status, "the driver refused")


def _version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10


def shared_memory(capability: Capability) -> int:
    """KiB of shared memory that one block may use (CUDA C++ programming guide, compute
    capabilities); the least that sm_80 and later have where the chip is not known."""
    return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}.get(
        capability, 99
    )
