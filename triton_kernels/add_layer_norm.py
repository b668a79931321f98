"""Residual add and LayerNorm: the sum is rounded once to the promoted dtype and normed from there.

Rows of more than 4096 columns have kernels of their own (add_layer_norm_wide.py). For the others:
forward: a program owns BLOCK_R whole rows; mean and variance in two passes over registers, fp32.
Backward: ``programs`` programs walk the rows with a fixed stride, keep dweight and dbias in fp32
registers and write one partial row each; a second kernel adds the partial rows in order, so the
result does not depend on timing. Bytes an element, bf16: forward 8 with a residual (x, residual,
normed, total), backward 8 (grad_normed, grad_total, total, dx).

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  whole rows in registers, 16-byte accesses, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels import add_layer_norm_wide as loops
from fastenc.triton_kernels._common import Chip, cast

MAX_WHOLE = 4096  # wider rows, or dweight and dbias beside them, spill out of a program's registers


@dataclass(frozen=True)
class Launch:
    """``block_c`` >= hidden: whole rows; else a row is walked in blocks."""

    block_r: int
    block_c: int
    num_warps: int
    programs: int  # backward only: partial rows of dweight and dbias


def candidates(hidden: int, dtype: torch.dtype, chip: Chip) -> tuple[Launch, ...]:
    """Launches for rows of ``hidden`` columns, the default first.

    A row of up to MAX_WHOLE columns lives in the registers of one program: 8 elements a thread, so
    that a thread's part of a bf16 row is one 16-byte access where the row is wide enough.
    """
    block_c = _common.power_of_2(hidden)
    if chip.backend == "cpu":
        return (Launch(2, block_c, 4, 2) if hidden <= 1024 else Launch(1, 256, 4, 2),)
    if block_c > MAX_WHOLE:
        programs = max(4 * chip.multiprocessors // triton.cdiv(hidden, 2048), 1)
        return (Launch(1, 2048, 8, programs),)
    num_warps = max(block_c // 256, 4)
    block_r = max(1024 // block_c, 1)
    waves = 4 if block_c <= 2048 else 2
    default = Launch(block_r, block_c, num_warps, waves * chip.multiprocessors)
    narrow = Launch(block_r, block_c, max(num_warps // 2, 1), waves * chip.multiprocessors)
    tall = Launch(2 * block_r, block_c, num_warps, waves * chip.multiprocessors)
    return (default, narrow, tall) if block_c <= 2048 else (default, narrow)  # tall spills


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, hidden, x_stride, residual_stride, eps, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < hidden)[None, :]
    out_offsets = row[:, None] * hidden + col[None, :]
    x_ptrs = x_ptr + row[:, None] * x_stride + col[None, :]
    total = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row[:, None] * residual_stride + col[None, :]
        total += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        rounded = cast(total, total_ptr.dtype.element_ty)
        tl.store(total_ptr + out_offsets, rounded, mask=inside)
        total = rounded.to(tl.float32)
    mean = tl.sum(total, axis=1) / hidden
    centred = tl.where(inside, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / hidden + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + col, mask=col < hidden, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=col < hidden, other=0.0).to(tl.float32)
        normed += bias[None, :]
    tl.store(normed_ptr + out_offsets, cast(normed, normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward_kernel(
    grad_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, programs, hidden, grad_stride, grad_total_stride, total_stride,
    HAS_GRAD_TOTAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + col, mask=col < hidden, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_R), programs):
        row = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (row < rows)[:, None] & (col < hidden)[None, :]
        grad_ptrs = grad_ptr + row[:, None] * grad_stride + col[None, :]
        total_ptrs = total_ptr + row[:, None] * total_stride + col[None, :]
        grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptrs, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        unit = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
        scaled = grad * weight[None, :]
        along = tl.sum(scaled * unit, axis=1) / hidden
        level = tl.sum(scaled, axis=1) / hidden
        dx = (scaled - level[:, None] - unit * along[:, None]) * rstd[:, None]
        if HAS_GRAD_TOTAL:
            more_ptrs = grad_total_ptr + row[:, None] * grad_total_stride + col[None, :]
            dx += tl.load(more_ptrs, mask=inside, other=0.0).to(tl.float32)
        dx_ptrs = dx_ptr + row[:, None] * hidden + col[None, :]
        tl.store(dx_ptrs, cast(dx, dx_ptr.dtype.element_ty), mask=inside)
        dweight += grad * unit
        if HAS_BIAS:
            dbias += grad
    partial_ptrs = partial_ptr + program.to(tl.int64) * hidden + col
    tl.store(partial_ptrs, tl.sum(dweight, axis=0), mask=col < hidden)
    if HAS_BIAS:
        partial_ptrs += programs.to(tl.int64) * hidden
        tl.store(partial_ptrs, tl.sum(dbias, axis=0), mask=col < hidden)


@triton.jit(do_not_specialize=["programs"])
def _reduce_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, programs, hidden,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (c, 0) adds the partial rows of dweight in order, program (c, 1) those of dbias."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    partial_ptr += which.to(tl.int64) * programs * hidden
    accumulator = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for base in range(0, programs, BLOCK_P):
        part = base + tl.arange(0, BLOCK_P)
        inside = (part < programs)[:, None] & (col < hidden)[None, :]
        partial_ptrs = partial_ptr + part[:, None].to(tl.int64) * hidden + col[None, :]
        accumulator += tl.load(partial_ptrs, mask=inside, other=0.0)
    result = cast(tl.sum(accumulator, axis=0), dweight_ptr.dtype.element_ty)
    if which == 0:
        tl.store(dweight_ptr + col, result, mask=col < hidden)
    else:
        tl.store(dbias_ptr + col, result, mask=col < hidden)


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, device = x.shape[-1], x.device
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = _common.empty(x.shape, dtype, device)
    total = _common.empty((0,) if residual is None else x.shape, dtype, device)
    mean, rstd = (_common.empty(x.shape[:-1], torch.float32, device) for _ in range(2))
    if x.numel() == 0:
        return normed, total, mean, rstd
    x = _common.flat_rows(x)
    residual = None if residual is None else _common.flat_rows(residual)
    weight = _common.unit_rows(weight)
    bias = None if bias is None else _common.unit_rows(bias)
    chip = _common.chip_of(device)

    rows = x.shape[0]
    tensors = x, residual, weight, bias, normed, total, mean, rstd
    scalars = hidden, x.stride(0), 0 if residual is None else residual.stride(0), eps
    given = {"HAS_RESIDUAL": residual is not None, "HAS_BIAS": bias is not None}

    def run(choice: Launch) -> None:
        constants = {**given, "BLOCK_C": choice.block_c, "num_warps": choice.num_warps}
        if choice.block_c < hidden:
            _common.launch(loops.wide_forward_kernel, (rows,), *tensors, *scalars, **constants)
            return
        _common.launch(
            _forward_kernel, (triton.cdiv(rows, choice.block_r),), *tensors, rows, *scalars,
            BLOCK_R=choice.block_r, **constants,
        )  # fmt: skip

    key = ("add_layer_norm_fwd", hidden, dtype, residual is not None, chip.name)
    _common.run_chosen(key, device, candidates(hidden, dtype, chip), run)
    return normed, total, mean, rstd


def add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, device = total.shape[-1], total.device
    dx = _common.empty(total.shape, total.dtype, device)
    dweight = _common.empty(weight.shape, weight.dtype, device)
    dbias = _common.empty(weight.shape if has_bias else (0,), weight.dtype, device)
    if total.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    grad_normed, total = _common.flat_rows(grad_normed), _common.flat_rows(total)
    grad_total = None if grad_total is None else _common.flat_rows(grad_total)
    weight = _common.unit_rows(weight)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    rows = total.shape[0]
    chip = _common.chip_of(device)

    tensors = grad_normed, grad_total, total, weight, mean, rstd, dx
    more_stride = 0 if grad_total is None else grad_total.stride(0)
    strides = grad_normed.stride(0), more_stride, total.stride(0)

    def run(choice: Launch) -> None:
        programs = min(choice.programs, triton.cdiv(rows, choice.block_r))
        partial = _common.empty((2, programs, hidden), torch.float32, device)
        constants = {"BLOCK_C": choice.block_c, "num_warps": choice.num_warps}
        more = {"HAS_GRAD_TOTAL": grad_total is not None}
        if choice.block_c < hidden:
            _common.launch(
                loops.wide_backward_kernel, (rows,), *tensors, hidden, *strides, **more, **constants
            )
            _common.launch(
                loops.wide_weights_kernel, (triton.cdiv(hidden, choice.block_c), programs),
                grad_normed, total, mean, rstd, partial, rows, programs, hidden,
                grad_normed.stride(0), total.stride(0), HAS_BIAS=has_bias, **constants,
            )  # fmt: skip
        else:
            _common.launch(
                _backward_kernel, (programs,), *tensors, partial, rows, programs, hidden, *strides,
                HAS_BIAS=has_bias, BLOCK_R=choice.block_r, **more, **constants,
            )  # fmt: skip
        block_c = 32
        _common.launch(
            _reduce_kernel, (triton.cdiv(hidden, block_c), 1 + has_bias),
            partial, dweight, dbias, programs, hidden, BLOCK_P=64, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip

    key = ("add_layer_norm_bwd", hidden, total.dtype, grad_total is not None, has_bias, chip.name)
    _common.run_chosen(key, device, candidates(hidden, total.dtype, chip), run)
    return dx, dweight, dbias
