"""The CUDA kernels' own sources on the CPU: ``tests/cuda_emulator``, compiled by g++."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
SOURCES = Path(__file__).parent / "cuda_emulator"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNLIMITED = 1 << 30
i32, i64, u32, f32, pointer = (
    ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p,
)  # fmt: skip


def compile_shared(source: Path, folder: Path, *flags: str) -> ctypes.CDLL:
    """A C++ source compiled by g++, undefined behaviour and misalignment being errors."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    out = folder / f"{source.stem}.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT}", "-fsanitize=undefined"]
        + ["-fno-sanitize-recover=all", *flags, str(source), "-o", str(out)],
        check=True,
    )
    return ctypes.CDLL(str(out))


def compile_model(name: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """``tests/cuda_emulator/<name>.cpp``."""
    source = SOURCES / f"{name}.cpp"
    return compile_shared(source, folder, "-DFASTENC_EMULATE", "-w", f"-I{SOURCES}", *flags)


def compile_shim(text: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """A C++ text over the headers of csrc; a warning is an error."""
    source = folder / "shim.cpp"
    source.write_text(text)
    return compile_shared(source, folder, "-Wall", "-Werror", *flags)


class HeadRows(ctypes.Structure):
    _fields_ = [("data", pointer), ("token_stride", i64), ("head_stride", i64)]

    @classmethod
    def of(cls, x: Tensor) -> HeadRows:
        assert x.stride(2) == 1
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class Parameter(ctypes.Structure):
    _fields_ = [("data", pointer), ("dtype", ctypes.c_int)]

    @classmethod
    def of(cls, x: Tensor | None) -> Parameter:
        return cls(None, 0) if x is None else cls(x.data_ptr(), DTYPES[x.dtype])


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        ("q", HeadRows), ("k", HeadRows), ("v", HeadRows), ("out", HeadRows),
        ("lse", pointer), ("cu_seqlens", pointer),
        ("num_seqs", i32), ("heads", i32), ("head_dim", i32), ("total_tokens", i64),
        ("left", i32), ("right", i32), ("vectors", ctypes.c_bool),
        ("scale_log2", f32), ("factor", f32), ("prescale", ctypes.c_bool),
        ("bias", Parameter), ("bias_radius", i32),
        ("cos", Parameter), ("sin", Parameter), ("rotary_vectors", ctypes.c_bool),
        ("seed", pointer), ("drop_below", u32), ("keep_scale", f32),
    ]  # fmt: skip


class AttentionGradArgs(ctypes.Structure):
    _fields_ = [
        ("forward", AttentionArgs),
        ("grad_out", HeadRows), ("dq", HeadRows), ("dk", HeadRows), ("dv", HeadRows),
        ("grad_lse", pointer), ("delta", pointer), ("bias_partials", pointer), ("scale", f32),
    ]  # fmt: skip


def aligned(*tensors: Tensor) -> bool:
    """Whether 16-byte accesses are legal for every row: csrc/cuda/attention_problem.cuh's rule."""
    return all(
        x.shape[-1] * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def attention_args(
    q, k, v, cu_seqlens, window, scale, dropout_p=0.0, seed=None, table=None, cos=None, sin=None
) -> tuple[AttentionArgs, Tensor, Tensor]:
    """What the launch code would pass, with NaN-poisoned out and lse."""
    total, heads, head_dim = q.shape
    out = poisoned(total, heads, head_dim, dtype=q.dtype)
    lse = poisoned(heads, total, dtype=torch.float32)
    prescaled = table is not None or scale <= 0
    args = AttentionArgs(
        HeadRows.of(q), HeadRows.of(k), HeadRows.of(v), HeadRows.of(out),
        lse.data_ptr(), cu_seqlens.data_ptr(),
        len(cu_seqlens) - 1, heads, head_dim, total,
        *(UNLIMITED if w < 0 else w for w in window), aligned(q, k, v, out),
        scale * math.log2(math.e), 1.0 if prescaled else scale * math.log2(math.e), prescaled,
        Parameter.of(table), 0 if table is None else table.shape[1] // 2,
        Parameter.of(cos), Parameter.of(sin),
        cos is not None and head_dim * q.element_size() % 32 == 0,
        None if seed is None else seed.data_ptr(),
        int(dropout_p * 2**32), 1 / (1 - dropout_p),
    )  # fmt: skip
    return args, out, lse
