"""GeGLU: ``act(x[:, :I]) * x[:, I:]`` in fp32 with one rounding; the backward recomputes.

A program owns (BLOCK_R rows, BLOCK_C columns) of the output and reads the two halves of those rows.
Bytes an output element: 3 forward (x 2, out 1 elements), 5 backward (x 2, grad 1, dx 2).

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  one tile a program, 16-byte accesses, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import Chip, cast

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): 0.5 (1 + tanh(u)) = sigmoid(2 u)
TANH_CUBIC = tl.constexpr(0.044715)


@dataclass(frozen=True)
class Launch:
    block_r: int
    block_c: int
    num_warps: int


def candidates(intermediate: int, dtype: torch.dtype, chip: Chip) -> tuple[Launch, ...]:
    """Launches for rows of ``intermediate`` columns, the default first.

    ``block_c`` is the widest power of two up to 1024 that wastes at most a sixteenth of its lanes:
    1152 and 2624 -> 128, 3072 -> 1024. 16 elements a thread keep the forward at 56 to 60 registers
    on sm_90, so that four blocks of 4 warps or more share a multiprocessor.
    """
    widths = [c for c in (1024, 512, 256, 128, 64) if -intermediate % c * 16 <= intermediate]
    block_c = widths[0] if widths else min(_common.power_of_2(intermediate), 1024)
    elements = 256 if chip.backend == "cpu" else 2048
    return tuple(
        Launch(max(elements * times // block_c, 1), block_c, num_warps)
        for times, num_warps in ((1, 4), (2, 8), (1, 8))
    )


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    """The activation and its slope, fp32."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(a * SQRT_HALF))
        slope = share + a * tl.exp(-0.5 * a * a) * INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(a * TANH_SCALE * (1.0 + a * a * TANH_CUBIC))
        inner = (1.0 + 3.0 * (a * a * TANH_CUBIC)) * TANH_SCALE
        slope = share + a * share * (1.0 - share) * inner
    else:
        share = tl.sigmoid(a)
        slope = share + a * share * (1.0 - share)
    return a * share, slope


@triton.jit
def _tile(rows, intermediate, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, col, (row < rows) & (col < intermediate)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, out_ptr, rows, intermediate, x_stride,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, intermediate, BLOCK_R, BLOCK_C)
    x_ptrs = x_ptr + row * x_stride + col
    a = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptrs + intermediate, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(a, ACTIVATION)
    out = cast(value * gate, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * intermediate + col, out, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, x_ptr, dx_ptr, rows, intermediate, grad_stride, x_stride,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(rows, intermediate, BLOCK_R, BLOCK_C)
    x_ptrs = x_ptr + row * x_stride + col
    a = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptrs + intermediate, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + col, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(a, ACTIVATION)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    dx_ptrs = dx_ptr + row * (2 * intermediate) + col
    tl.store(dx_ptrs, cast(grad * gate * slope, dtype), mask=inside)
    tl.store(dx_ptrs + intermediate, cast(grad * value, dtype), mask=inside)


def _run(kernel, op, tensors, rows, intermediate, strides, activation) -> None:
    out = tensors[-1]
    if out.numel() == 0:
        return
    chip = _common.chip_of(out.device)

    def run(choice: Launch) -> None:
        grid = (triton.cdiv(rows, choice.block_r), triton.cdiv(intermediate, choice.block_c))
        _common.launch(
            kernel, grid, *tensors, rows, intermediate, *strides,
            ACTIVATION=activation, BLOCK_R=choice.block_r, BLOCK_C=choice.block_c,
            num_warps=choice.num_warps,
        )  # fmt: skip

    key = (op, intermediate, out.dtype, activation, chip.name)
    _common.run_chosen(key, out.device, candidates(intermediate, out.dtype, chip), run)


def geglu_fwd(x: Tensor, activation: str) -> Tensor:
    intermediate = x.shape[-1] // 2
    out = _common.empty((*x.shape[:-1], intermediate), x.dtype, x.device)
    if out.numel():
        x = _common.flat_rows(x)
        _run(
            _forward_kernel, "geglu_fwd", (x, out), x.shape[0], intermediate, (x.stride(0),),
            activation,
        )  # fmt: skip
    return out


def geglu_bwd(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    intermediate = x.shape[-1] // 2
    dx = _common.empty(x.shape, x.dtype, x.device)
    if dx.numel():
        grad, x = _common.flat_rows(grad), _common.flat_rows(x)
        strides = grad.stride(0), x.stride(0)
        _run(
            _backward_kernel, "geglu_bwd", (grad, x, dx), x.shape[0], intermediate, strides,
            activation,
        )  # fmt: skip
    return dx
