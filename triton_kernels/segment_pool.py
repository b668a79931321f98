"""Segment pooling: mean, max, first or last row of each packed sequence, fp32, in a fixed order.

Every sequence is cut into chunks of ROWS rows from its own start; one kernel reduces the chunks,
a second one adds (or compares) a sequence's chunks in order. The order depends on the sequence
alone, so its row is bit-equal whatever is packed beside it, and one long sequence fills the chip.
A maximum takes its first occurrence, and a NaN wins over every number.

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  two kernels, 16-byte accesses, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import Chip, cast, locate


@dataclass(frozen=True)
class Launch:
    rows: int
    block_c: int
    num_warps: int


def choose(hidden: int, dtype: torch.dtype, chip: Chip) -> Launch:
    """``rows`` fixes the order of summation, so it is the same for every shape and dtype."""
    if chip.backend == "cpu":
        return Launch(16, 32, 4)
    return Launch(64, min(_common.power_of_2(hidden), 128), 4)


@triton.jit
def _first_maximum(value, index, valid):
    """Along axis 0: the maximum (NaN wins) and the smallest index that holds it, -1 for none."""
    nan = valid & (value != value)
    has_nan = tl.max(nan.to(tl.int32), axis=0) > 0
    best = tl.max(tl.where(valid & (value == value), value, float("-inf")), axis=0)
    holds = tl.where(has_nan[None, :], nan, valid & (value == best[None, :]))
    first = tl.min(tl.where(holds, index, 2147483647), axis=0)
    none = first == 2147483647
    return tl.where(has_nan, float("nan"), best), tl.where(none, -1, first)


@triton.jit(do_not_specialize=["num_seqs"])
def _chunk_kernel(
    x_ptr, cu_ptr, part_ptr, part_index_ptr, num_seqs, hidden, x_stride,
    MAXIMUM: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    start, length, first, _ = locate(slot, cu_ptr, num_seqs, ROWS)
    if first >= length:
        return
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = first + tl.arange(0, ROWS)
    valid = (row < length)[:, None] & (col < hidden)[None, :]
    x_ptrs = x_ptr + (start + row).to(tl.int64)[:, None] * x_stride + col[None, :]
    x = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)
    part_offsets = slot.to(tl.int64) * hidden + col
    if MAXIMUM:
        best, index = _first_maximum(x, (start + row)[:, None], valid)
        tl.store(part_ptr + part_offsets, best, mask=col < hidden)
        tl.store(part_index_ptr + part_offsets, index, mask=col < hidden)
    else:
        tl.store(part_ptr + part_offsets, tl.sum(x, axis=0), mask=col < hidden)


@triton.jit
def _finish_kernel(
    part_ptr, part_index_ptr, cu_ptr, out_ptr, index_ptr, hidden,
    MAXIMUM: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = col < hidden
    start = tl.load(cu_ptr + seq)
    length = tl.load(cu_ptr + seq + 1) - start
    first_slot = (start // ROWS + seq).to(tl.int64)
    result = tl.zeros((BLOCK_C,), tl.float32)
    index = tl.full((BLOCK_C,), -1, tl.int32)
    for chunk in range(0, tl.cdiv(length, ROWS)):
        part_offsets = (first_slot + chunk) * hidden + col
        part = tl.load(part_ptr + part_offsets, mask=inside, other=0.0)
        if MAXIMUM:
            part_index = tl.load(part_index_ptr + part_offsets, mask=inside, other=-1)
            beats = (part > result) | ((part != part) & (result == result)) | (index < 0)
            result = tl.where(beats, part, result)
            index = tl.where(beats, part_index, index)
        else:
            result += part
    if not MAXIMUM:
        result = result / tl.maximum(length, 1)
    out_offsets = seq.to(tl.int64) * hidden + col
    tl.store(out_ptr + out_offsets, cast(result, out_ptr.dtype.element_ty), mask=inside)
    if MAXIMUM:
        tl.store(index_ptr + out_offsets, index, mask=inside)


@triton.jit
def _pick_kernel(
    x_ptr, cu_ptr, out_ptr, hidden, x_stride, LAST: tl.constexpr, BLOCK_C: tl.constexpr
):
    seq = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(cu_ptr + seq)
    end = tl.load(cu_ptr + seq + 1)
    row = end - 1 if LAST else start
    x_ptrs = x_ptr + row.to(tl.int64) * x_stride + col
    x = tl.load(x_ptrs, mask=col < tl.where(start < end, hidden, 0), other=0.0)
    tl.store(out_ptr + seq.to(tl.int64) * hidden + col, x, mask=col < hidden)


@triton.jit(do_not_specialize=["num_seqs"])
def _backward_kernel(
    grad_ptr, index_ptr, cu_ptr, dx_ptr, num_seqs, hidden, grad_stride,
    MODE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start, length, first, seq = locate(tl.program_id(0), cu_ptr, num_seqs, ROWS)
    if first >= length:
        return
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = col < hidden
    row = first + tl.arange(0, ROWS)
    grad_ptrs = grad_ptr + seq.to(tl.int64) * grad_stride + col
    grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)[None, :]
    if MODE == "mean":
        dx = tl.broadcast_to(grad / length, (ROWS, BLOCK_C))
    elif MODE == "max":
        index = tl.load(index_ptr + seq.to(tl.int64) * hidden + col, mask=inside, other=-1)
        dx = tl.where((start + row)[:, None] == index[None, :], grad, 0.0)
    elif MODE == "cls":
        dx = tl.where((row == 0)[:, None], grad, 0.0)
    else:
        dx = tl.where((row == length - 1)[:, None], grad, 0.0)
    dx_ptrs = dx_ptr + (start + row).to(tl.int64)[:, None] * hidden + col[None, :]
    stored = (row < length)[:, None] & inside[None, :]
    tl.store(dx_ptrs, cast(dx, dx_ptr.dtype.element_ty), mask=stored)


def segment_pool_fwd(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    total, hidden = x.shape
    num_seqs = cu_seqlens.shape[0] - 1
    out = _common.empty((num_seqs, hidden), x.dtype, x.device)
    index = _common.empty(out.shape if mode == "max" else (0,), torch.int32, x.device)
    if out.numel() == 0:
        return out, index
    x, cu = _common.unit_rows(x), _common.unit_rows(cu_seqlens)
    choice = choose(hidden, x.dtype, _common.chip_of(x.device))
    columns = triton.cdiv(hidden, choice.block_c)
    shape = {"BLOCK_C": choice.block_c, "num_warps": choice.num_warps}
    if mode in ("cls", "last"):
        _common.launch(
            _pick_kernel, (num_seqs, columns), x, cu, out, hidden, x.stride(0),
            LAST=mode == "last", **shape,
        )  # fmt: skip
        return out, index
    chunks = _common.slots(total, num_seqs, choice.rows)
    part = _common.empty((chunks, hidden), torch.float32, x.device)
    part_index = _common.empty(part.shape if mode == "max" else (0,), torch.int32, x.device)
    shape.update(MAXIMUM=mode == "max", ROWS=choice.rows)
    _common.launch(
        _chunk_kernel, (chunks, columns), x, cu, part, part_index, num_seqs, hidden, x.stride(0),
        **shape,
    )  # fmt: skip
    _common.launch(
        _finish_kernel, (num_seqs, columns), part, part_index, cu, out, index, hidden, **shape
    )
    return out, index


def segment_pool_bwd(
    grad: Tensor, index: Tensor, cu_seqlens: Tensor, total_tokens: int, mode: str
) -> Tensor:
    hidden = grad.shape[1]
    num_seqs = cu_seqlens.shape[0] - 1
    dx = _common.empty((total_tokens, hidden), grad.dtype, grad.device)
    if dx.numel() == 0:
        return dx
    grad, cu = _common.unit_rows(grad), _common.unit_rows(cu_seqlens)
    choice = choose(hidden, grad.dtype, _common.chip_of(grad.device))
    grid = _common.slots(total_tokens, num_seqs, choice.rows), triton.cdiv(hidden, choice.block_c)
    _common.launch(
        _backward_kernel, grid, grad, index.contiguous(), cu, dx, num_seqs, hidden, grad.stride(0),
        MODE=mode, ROWS=choice.rows, BLOCK_C=choice.block_c, num_warps=choice.num_warps,
    )  # fmt: skip
    return dx
