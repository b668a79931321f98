"""Span pooling: ``relu(start_i + end_{i + w})`` for each width, zeros past the sequence's end.

Forward: a program owns (BLOCK_M words of one sequence, BLOCK_C columns) and writes their max_width
rows. Backward: it sums the gradients of the spans that start at its words and of those that end
there, in the order of the widths, so there are no atomics. Bytes a word and column, bf16:
2 max_width + 4 forward, 4 max_width + 8 backward (a gradient is read by its start and by its end).

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  the start row in registers across the widths, 16-byte accesses: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import Chip, cast, locate, wide


@dataclass(frozen=True)
class Launch:
    block_m: int
    block_c: int
    num_warps: int


def candidates(size: int, dtype: torch.dtype, chip: Chip) -> tuple[Launch, ...]:
    """Launches for rows of ``size`` columns, the default first."""
    if chip.backend == "cpu":
        return (Launch(8, 32, 4),)
    block_c = max(min(_common.power_of_2(size), 256), 8)
    choices = Launch(8, block_c, 4), Launch(16, block_c, 8), Launch(16, block_c, 4)
    return choices[:2] if dtype == torch.float32 else choices  # the last one spills


@triton.jit
def _rows(ptr, row, col, stride, mask):
    return tl.load(ptr + wide(row)[:, None] * stride + col[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_seqs"])
def _forward_kernel(
    start_ptr, end_ptr, cu_ptr, out_ptr, num_seqs, max_width, size, start_stride, end_stride,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start, length, first, _ = locate(tl.program_id(0), cu_ptr, num_seqs, BLOCK_M)
    if first >= length:
        return
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    word = first + tl.arange(0, BLOCK_M)
    there = (word < length)[:, None] & (col < size)[None, :]
    a = _rows(start_ptr, start + word, col, start_stride, there).to(tl.float32)
    out_rows = out_ptr + wide(start + word)[:, None] * max_width * size + col[None, :]
    for width in range(0, max_width):
        exists = there & (word + width < length)[:, None]
        b = _rows(end_ptr, start + word + width, col, end_stride, exists).to(tl.float32)
        x = a + b
        x = tl.where(exists & ((x > 0) | (x != x)), x, 0.0)
        tl.store(out_rows + width * size, cast(x, out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_seqs"])
def _backward_kernel(
    grad_ptr, start_ptr, end_ptr, cu_ptr, dstart_ptr, dend_ptr, num_seqs, max_width, size,
    start_stride, end_stride, grad_stride_i, grad_stride_w,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start, length, first, _ = locate(tl.program_id(0), cu_ptr, num_seqs, BLOCK_M)
    if first >= length:
        return
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    word = first + tl.arange(0, BLOCK_M)
    there = (word < length)[:, None] & (col < size)[None, :]
    a = _rows(start_ptr, start + word, col, start_stride, there).to(tl.float32)
    b = _rows(end_ptr, start + word, col, end_stride, there).to(tl.float32)
    dstart = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dend = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for width in range(0, max_width):
        grads = grad_ptr + width * grad_stride_w
        exists = there & (word + width < length)[:, None]
        other = _rows(end_ptr, start + word + width, col, end_stride, exists).to(tl.float32)
        grad = _rows(grads, start + word, col, grad_stride_i, exists).to(tl.float32)
        dstart += tl.where(a + other > 0, grad, 0.0)
        exists = there & (word >= width)[:, None]
        other = _rows(start_ptr, start + word - width, col, start_stride, exists).to(tl.float32)
        grad = _rows(grads, start + word - width, col, grad_stride_i, exists).to(tl.float32)
        dend += tl.where(other + b > 0, grad, 0.0)
    offsets = wide(start + word)[:, None] * size + col[None, :]
    tl.store(dstart_ptr + offsets, cast(dstart, dstart_ptr.dtype.element_ty), mask=there)
    tl.store(dend_ptr + offsets, cast(dend, dend_ptr.dtype.element_ty), mask=there)


def _run(kernel, op: str, tensors: tuple, start: Tensor, cu: Tensor, *scalars: int) -> None:
    words, size = start.shape
    num_seqs = cu.shape[0] - 1
    chip = _common.chip_of(start.device)

    def run(choice: Launch) -> None:
        tiles = _common.slots(words, num_seqs, choice.block_m)
        _common.launch(
            kernel, (tiles, triton.cdiv(size, choice.block_c)), *tensors, num_seqs, *scalars,
            BLOCK_M=choice.block_m, BLOCK_C=choice.block_c, num_warps=choice.num_warps,
        )  # fmt: skip

    key = (op, size, start.dtype, chip.name)
    _common.run_chosen(key, start.device, candidates(size, start.dtype, chip), run)


def span_pool_fwd(start: Tensor, end: Tensor, cu_words: Tensor, max_width: int) -> Tensor:
    words, size = start.shape
    out = _common.empty((words, max_width, size), start.dtype, start.device)
    if out.numel():
        start, end, cu = (_common.unit_rows(x) for x in (start, end, cu_words))
        _run(
            _forward_kernel, "span_pool_fwd", (start, end, cu, out), start, cu, max_width, size,
            start.stride(0), end.stride(0),
        )  # fmt: skip
    return out


def span_pool_bwd(
    grad: Tensor, start: Tensor, end: Tensor, cu_words: Tensor, max_width: int
) -> tuple[Tensor, Tensor]:
    dstart, dend = (_common.empty(x.shape, x.dtype, x.device) for x in (start, end))
    if start.numel():
        grad, start, end, cu = (_common.unit_rows(x) for x in (grad, start, end, cu_words))
        _run(
            _backward_kernel, "span_pool_bwd", (grad, start, end, cu, dstart, dend), start, cu,
            max_width, start.shape[1], start.stride(0), end.stride(0), *grad.stride()[:2],
        )  # fmt: skip
    return dstart, dend
