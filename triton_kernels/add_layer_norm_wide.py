"""Rows too wide for the registers of a program: walked in blocks of BLOCK_C columns.

Forward: one program a row, three walks (mean, variance, output); the second and third find the row
in L1 or L2. Backward: one program a row walks twice (the two sums of the row, then dx); dweight and
dbias have programs of their own, each BLOCK_C columns of every programs-th row, whose partial rows
add_layer_norm adds in order. Accumulators are BLOCK_C wide for any ``hidden``: nothing spills,
and no row is too wide. Compiled, never timed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastenc.triton_kernels._common import cast, wide


@triton.jit
def _total(
    x_ptr, residual_ptr, col, inside, HAS_RESIDUAL: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """x + residual in the columns ``col``, rounded as it is returned, fp32."""
    total = tl.load(x_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + col, mask=inside, other=0.0).to(tl.float32)
        total = cast(total, dtype).to(tl.float32)
    return total


@triton.jit
def wide_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr, mean_ptr, rstd_ptr, hidden,
    x_stride, residual_stride, eps, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = wide(tl.program_id(0))
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    step = tl.arange(0, BLOCK_C)
    x_ptr += row * x_stride
    normed_ptr += row * hidden
    if HAS_RESIDUAL:
        residual_ptr += row * residual_stride
        total_ptr += row * hidden
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, hidden, BLOCK_C):
        col = first + step
        inside = col < hidden
        total = _total(x_ptr, residual_ptr, col, inside, HAS_RESIDUAL, dtype)
        if HAS_RESIDUAL:
            tl.store(total_ptr + col, cast(total, dtype), mask=inside)
        sums += total
    mean = tl.sum(sums, axis=0) / hidden
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, hidden, BLOCK_C):
        col = first + step
        inside = col < hidden
        total = _total(x_ptr, residual_ptr, col, inside, HAS_RESIDUAL, dtype)
        centred = tl.where(inside, total - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / hidden + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, hidden, BLOCK_C):
        col = first + step
        inside = col < hidden
        total = _total(x_ptr, residual_ptr, col, inside, HAS_RESIDUAL, dtype)
        normed = (total - mean) * rstd
        normed *= tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            normed += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed_ptr + col, cast(normed, dtype), mask=inside)


@triton.jit
def _scaled_and_total(grad_ptr, weight_ptr, total_ptr, col, inside):
    """grad * weight and total in the columns ``col``, fp32."""
    scaled = tl.load(grad_ptr + col, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    return scaled, tl.load(total_ptr + col, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def wide_backward_kernel(
    grad_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, hidden,
    grad_stride, grad_total_stride, total_stride, HAS_GRAD_TOTAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = wide(tl.program_id(0))
    step = tl.arange(0, BLOCK_C)
    grad_ptr += row * grad_stride
    total_ptr += row * total_stride
    dx_ptr += row * hidden
    if HAS_GRAD_TOTAL:
        grad_total_ptr += row * grad_total_stride
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    alongs = tl.zeros((BLOCK_C,), tl.float32)
    levels = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, hidden, BLOCK_C):
        col = first + step
        inside = col < hidden
        scaled, total = _scaled_and_total(grad_ptr, weight_ptr, total_ptr, col, inside)
        alongs += scaled * ((total - mean) * rstd)
        levels += scaled
    along = tl.sum(alongs, axis=0) / hidden
    level = tl.sum(levels, axis=0) / hidden
    for first in range(0, hidden, BLOCK_C):
        col = first + step
        inside = col < hidden
        scaled, total = _scaled_and_total(grad_ptr, weight_ptr, total_ptr, col, inside)
        dx = (scaled - level - (total - mean) * rstd * along) * rstd
        if HAS_GRAD_TOTAL:
            dx += tl.load(grad_total_ptr + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + col, cast(dx, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def wide_weights_kernel(
    grad_ptr, total_ptr, mean_ptr, rstd_ptr, partial_ptr, rows, programs, hidden, grad_stride,
    total_stride, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, part): one partial row of dweight and of dbias."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    inside = col < hidden
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for number in range(part, rows, programs):
        row = wide(number)
        grad = tl.load(grad_ptr + row * grad_stride + col, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + row * total_stride + col, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + row)
        dweight += grad * ((total.to(tl.float32) - mean) * tl.load(rstd_ptr + row))
        if HAS_BIAS:
            dbias += grad
    partial_ptrs = partial_ptr + wide(part) * hidden + col
    tl.store(partial_ptrs, dweight, mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptrs + wide(programs) * hidden, dbias, mask=inside)
