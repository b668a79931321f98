"""RoPE: rotate-half in fp32 with one rounding, forward and inverse, from any strides.

A program owns BLOCK_T tokens, reads their rows of cos and sin once and walks the heads in groups
of BLOCK_H: the grid is linear in tokens, flat in heads and in num_seqs. A head's two halves are
one (BLOCK_T, BLOCK_H, BLOCK_D) tile each. Bytes an element: 2 elements, and cos and sin once a
token. Positions come from a tensor, or from cu_seqlens (restarting with each sequence).

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  tables in registers across the heads, 16-byte accesses: registers in docs/kernels.md.
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
    block_t: int
    block_h: int
    num_warps: int


def candidates(heads: int, head_dim: int, dtype: torch.dtype, chip: Chip) -> tuple[Launch, ...]:
    """Launches for ``heads`` heads a token (q and k counted together), the default first.

    A head group is at most 8 wide, so that 24 heads of ModernBERT waste none.
    """
    block_h = min(_common.power_of_2(heads), 8)
    lanes = block_h * _common.power_of_2(head_dim // 2)
    if chip.backend == "cpu":
        return (Launch(max(512 // lanes, 1), block_h, 4),)
    fp32 = dtype == torch.float32
    elements = 1024 if fp32 else 2048
    return tuple(
        Launch(max(elements * times // lanes, 1), block_h, num_warps)
        for times, num_warps in ((1, 4), (2, 4), (2, 8))[: 2 if fp32 else 3]  # the last one spills
    )


@triton.jit
def turn(a, b, cos, sin):
    """The rotation of the two halves of a head, fp32."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(do_not_specialize=["total_tokens", "num_seqs"])
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, pos_ptr, out_ptr, total_tokens, num_seqs,
    x_stride_t, x_stride_n, x_stride_h, cos_stride, sin_stride, out_stride_t, out_stride_n,
    out_stride_h, heads, N_HEADS: tl.constexpr, HALF: tl.constexpr, FROM_CU: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if FROM_CU:
        start, length, first, _ = locate(tl.program_id(0), pos_ptr, num_seqs, BLOCK_T)
        pos = first + tl.arange(0, BLOCK_T)
        inside = pos < length
        token = (start + pos).to(tl.int64)
    else:
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = token < total_tokens
        pos = tl.load(pos_ptr + token, mask=inside, other=0)
    dim = tl.arange(0, BLOCK_D)
    table = inside[:, None] & (dim < HALF)[None, :]
    pos = pos.to(tl.int64)[:, None]
    cos = tl.load(cos_ptr + pos * cos_stride + dim[None, :], mask=table, other=0.0)
    sin = tl.load(sin_ptr + pos * sin_stride + dim[None, :], mask=table, other=0.0)
    cos = cos.to(tl.float32)[:, None, :]
    sin = sin.to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin
    x_rows = x_ptr + (token * x_stride_t)[:, None, None] + dim[None, None, :]
    out_rows = out_ptr + (token * out_stride_t)[:, None, None] + dim[None, None, :]
    for base in tl.static_range(0, N_HEADS, BLOCK_H):
        head = base + tl.arange(0, BLOCK_H)[None, :, None]
        mask = table[:, None, :] & (head < N_HEADS)
        outer = head // heads
        inner = head % heads
        x_ptrs = x_rows + outer.to(tl.int64) * x_stride_n + inner.to(tl.int64) * x_stride_h
        a = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
        a, b = turn(a, b, cos, sin)
        out_ptrs = out_rows + outer.to(tl.int64) * out_stride_n + inner * out_stride_h
        tl.store(out_ptrs, cast(a, out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + HALF, cast(b, out_ptr.dtype.element_ty), mask=mask)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    out: Tensor,
    inverse: bool = False,
    from_cu: bool = False,
) -> Tensor:
    """Rotate ``x`` (total_tokens, [n,] heads, head_dim) into ``out``, which may be ``x`` itself.

    ``positions``: one a token, or with ``from_cu`` the cu_seqlens from which they restart.
    """
    if x.numel() == 0:
        return out
    total, heads, head_dim = x.shape[0], x.shape[-2], x.shape[-1]
    n = x.shape[1] if x.dim() == 4 else 1
    cos, sin = _common.unit_rows(cos), _common.unit_rows(sin)
    positions = _common.unit_rows(positions)
    chip = _common.chip_of(x.device)
    num_seqs = positions.shape[0] - 1

    def strides(tensor):
        return tensor.stride(0), tensor.stride(1) if tensor.dim() == 4 else 0, tensor.stride(-2)

    def run(choice: Launch) -> None:
        tiles = (
            _common.slots(total, num_seqs, choice.block_t)
            if from_cu
            else triton.cdiv(total, choice.block_t)
        )
        _common.launch(
            _rope_kernel, (tiles,), x, cos, sin, positions, out, total, num_seqs,
            *strides(x), cos.stride(0), sin.stride(0), *strides(out), heads,
            N_HEADS=n * heads, HALF=head_dim // 2, FROM_CU=from_cu, INVERSE=inverse,
            BLOCK_T=choice.block_t, BLOCK_H=choice.block_h,
            BLOCK_D=_common.power_of_2(head_dim // 2), num_warps=choice.num_warps,
        )  # fmt: skip

    choices = candidates(n * heads, head_dim, x.dtype, chip)
    in_place = out.data_ptr() == x.data_ptr()
    key = ("rope", n * heads, head_dim, x.dtype, cos.dtype, chip.name)
    _common.run_chosen(key, x.device, choices[:1] if in_place else choices, run)
    return out


def rope_fwd(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    out = _common.empty(x.shape, x.dtype, x.device)
    return rotate(_common.unit_rows(x), cos, sin, positions, out)


def rope_bwd(grad: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    out = _common.empty(grad.shape, grad.dtype, grad.device)
    return rotate(_common.unit_rows(grad), cos, sin, positions, out, inverse=True)
