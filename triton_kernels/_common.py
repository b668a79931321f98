"""What the Triton kernels share: chips, buffers, launches, tuning, and small device functions."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# ---- chips -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """What a launch choice may depend on. ``shared``: bytes of shared memory one block may hold."""

    name: str
    backend: str
    arch: int
    multiprocessors: int
    shared: int


CHIPS = {
    "sm_80": Chip("sm_80", "cuda", 80, 108, 166_912),
    "sm_89": Chip("sm_89", "cuda", 89, 128, 101_376),
    "sm_90": Chip("sm_90", "cuda", 90, 132, 232_448),
    "sm_100": Chip("sm_100", "cuda", 100, 148, 232_448),
    "gfx942": Chip("gfx942", "hip", 942, 304, 65_536),
    # Tiles small enough that short test sequences cross several of them.
    "interpreter": Chip("interpreter", "cpu", 0, 2, 1 << 30),
}


def chip_of(device: torch.device) -> Chip:
    """The chip of ``device``; the interpreter's for a CPU tensor."""
    if device.type == "cpu":
        return CHIPS["interpreter"]
    return _chip_of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip_of_index(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    count = properties.multi_processor_count
    if torch.version.hip:
        return Chip(properties.gcnArchName.split(":")[0], "hip", 942, count, 65_536)
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 101_376)
    return Chip(f"sm_{arch}", "cuda", arch, count, shared)


# ---- host helpers ------------------------------------------------------------------------------


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace comes from here, so that a test can fill it with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


def unit_rows(x: Tensor) -> Tensor:
    """``x`` with adjacent elements in its last dimension; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def flat_rows(x: Tensor) -> Tensor:
    """``x`` (..., columns) as (rows, columns), unit stride in a row; a view where one exists."""
    return unit_rows(x.reshape(-1, x.shape[-1]))


def tile_rows(x: Tensor) -> Tensor:
    """:func:`unit_rows`, and rows so near that 32 bits hold any offset within a tile of them."""
    return unit_rows(x) if x.stride(0) < 1 << 23 else x.contiguous()


def tf32_allowed() -> bool:
    # allow_tf32 raises once torch.backends.fp32_precision is set, as TrainingArguments(tf32) does.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of the products: fp32 in full, unless torch's switch allows tf32."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the device of the first tensor argument, whichever device is current."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


# ---- tuning, only behind FASTENC_AUTOTUNE=1 ----------------------------------------------------

_tuned: dict[str, dict] = {}
_tuned_file: str | None = None


def _load_tuned() -> None:
    global _tuned_file
    path = os.environ.get("FASTENC_AUTOTUNE_CACHE")
    if path and path != _tuned_file:
        _tuned_file = path
        if os.path.exists(path):
            with open(path) as file:
                _tuned.update(json.load(file))


def _store_tuned() -> None:
    if _tuned_file:
        partial = f"{_tuned_file}.{os.getpid()}"
        with open(partial, "w") as file:
            json.dump(_tuned, file, indent=1, sort_keys=True)
        os.replace(partial, _tuned_file)


def _may_time(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def run_chosen(
    key: tuple, device: torch.device, candidates: Sequence[Any], run: Callable[[Any], None]
) -> None:
    """``run(candidates[0])``; under FASTENC_AUTOTUNE=1 the fastest candidate for ``key`` instead.

    Timings are kept in memory and, if FASTENC_AUTOTUNE_CACHE names a file, in that file.
    """
    if os.environ.get("FASTENC_AUTOTUNE") != "1":
        return run(candidates[0])
    _load_tuned()
    name = "|".join(map(str, key))
    known = _tuned.get(name)
    best = next((c for c in candidates if asdict(c) == known), None)
    if best is None:
        if not _may_time(device):
            return run(candidates[0])
        times = [triton.testing.do_bench(functools.partial(run, c)) for c in candidates]
        best = candidates[times.index(min(times))]
        _tuned[name] = asdict(best)
        _store_tuned()
    run(best)


# ---- device functions --------------------------------------------------------------------------


@triton.jit
def wide(x):
    return tl.cast(x, tl.int64)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, round to nearest even (the interpreter truncates to bfloat16)."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """Matrix product with an fp32 accumulator (the interpreter cannot multiply bfloat16)."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def locate(slot, cu_ptr, num_seqs, BLOCK: tl.constexpr):
    """The tile of ``slot`` in a grid of ``total_tokens // BLOCK + num_seqs`` slots.

    Sequence s owns the slots from ``cu[s] // BLOCK + s`` on, which are at least as many as its
    tiles, so that no list of tiles is needed. Returns (first row of the sequence, its length, the
    tile's offset in it, the sequence); an offset >= length means an empty slot.
    """
    SCAN: tl.constexpr = 16 if INTERPRET else 1024
    begun = 0
    for base in range(0, num_seqs, SCAN):
        seqs = base + tl.arange(0, SCAN)
        valid = seqs < num_seqs
        first = tl.load(cu_ptr + seqs, mask=valid, other=0)
        begun += tl.sum((valid & (first // BLOCK + seqs <= slot)).to(tl.int32))
    seq = begun - 1
    start = tl.load(cu_ptr + seq)
    length = tl.load(cu_ptr + seq + 1) - start
    return start, length, (slot - start // BLOCK - seq) * BLOCK, seq


def slots(total_tokens: int, num_seqs: int, block: int) -> int:
    """The number of slots that :func:`locate` divides among the sequences."""
    return total_tokens // block + num_seqs
