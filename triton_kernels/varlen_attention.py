"""Packed attention: which kernel, with which launch, and the calls.

Forward: the windowed kernel where the window's span fits its registers, the general one elsewhere.
Backward: as :mod:`varlen_attention_bwd` says. Nothing reads device memory on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels import varlen_attention_launch as choose
from fastenc.triton_kernels._attention import MAX_HEAD_DIM, pieces_of, schedule
from fastenc.triton_kernels._common import Chip
from fastenc.triton_kernels.varlen_attention_bias import bias_gradient
from fastenc.triton_kernels.varlen_attention_bwd import backward_kernel
from fastenc.triton_kernels.varlen_attention_fwd import forward_kernel
from fastenc.triton_kernels.varlen_attention_launch import (
    Launch,
    Need,
    peels,
    window_blocks,
    window_low,
)
from fastenc.triton_kernels.windowed_attention_fwd import windowed_forward_kernel


@dataclass(frozen=True)
class Options:
    """What a call asks beside its tensors; ``cos`` and ``sin`` rotate q (and k where asked)."""

    cu_seqlens: Tensor
    left: int
    right: int
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    bias: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def dropout(self) -> bool:
        return self.dropout_p > 0.0

    @property
    def threshold(self) -> int:
        return int(self.dropout_p * 2**32)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)

    @property
    def reach(self) -> tuple[int, int]:
        """(left, right) with a distance no sequence has for "unlimited"."""
        return tuple(
            1 << 30 if side < 0 else min(side, 1 << 30) for side in (self.left, self.right)
        )

    def need(self, q: Tensor) -> Need:
        return Need(
            q.shape[2], q.dtype, self.left, self.right, self.cos is not None, self.dropout,
            self.bias is not None,
        )  # fmt: skip

    def key(self, name: str, need: Need, chip: Chip) -> tuple:
        """What a tuned launch depends on."""
        return (name, *vars(need).values(), chip.name)

    def pointers(self) -> tuple:
        return self.cos, self.sin, self.seed, self.bias

    def table_strides(self) -> tuple[int, ...]:
        cos, sin, bias = self.cos, self.sin, self.bias
        return (
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            *((0, 0, 0) if bias is None else (*bias.stride(), (bias.shape[1] - 1) // 2)),
        )

    def flags(self, dtype: torch.dtype) -> dict:
        return {
            "DROPOUT": self.dropout,
            "BIAS": self.bias is not None,
            "RAW": self.bias is None and self.scale > 0,
            "PRECISION": _common.precision(dtype),
        }


def check_head_dim(head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"attention: the Triton kernels serve head_dim up to {MAX_HEAD_DIM}, got {head_dim}"
        )


def row_strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in (x.stride(0), x.stride(1)))


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options) -> None:
    """The forward into ``out`` and ``lse``. With tables q is rotated, in a window k too."""
    total, heads, head_dim = q.shape
    if q.numel() == 0:
        return
    chip = _common.chip_of(q.device)
    need = options.need(q)
    shared = {
        "QK_PIECES": pieces_of(head_dim, need.rope), "V_PIECES": pieces_of(head_dim),
        "ROPE": need.rope, **options.flags(q.dtype),
    }  # fmt: skip
    plain = {name: value for name, value in shared.items() if name != "BIAS"}
    strides = (*row_strides(q, k, v, out), *options.table_strides())
    scalars = options.scale, options.threshold, options.keep_scale
    num_seqs = options.cu_seqlens.shape[0] - 1

    def windowed(launch: Launch) -> None:
        slots = _common.slots(total, num_seqs, launch.block_m)
        _common.launch(
            windowed_forward_kernel, (slots * heads,), q, k, v, out, lse, options.cu_seqlens,
            *options.pointers()[:3], num_seqs, total, heads, *scalars, *strides[:-3], **plain,
            LEFT=options.left, RIGHT=options.right, LOW=window_low(options.left),
            NUM_BLOCKS=window_blocks(options.left, options.right, launch.block_m, launch.block_n),
            **launch.constants(),
        )  # fmt: skip

    def general(launch: Launch) -> None:
        tiles = schedule(options.cu_seqlens, total, launch.block_m)
        _common.launch(
            forward_kernel, (tiles.shape[1] * heads,), q, k, v, out, lse, tiles,
            *options.pointers(), tiles.shape[1], total, heads, *options.reach, *scalars, *strides,
            **shared, WINDOWED=need.limited, PEEL=peels(need), **launch.constants(),
        )  # fmt: skip

    narrow = choose.windowed_forward(need, chip)
    if narrow:
        _common.run_chosen(options.key("windowed_fwd", need, chip), q.device, narrow, windowed)
    else:
        choices = choose.forward(need, chip)
        _common.run_chosen(options.key("attention_fwd", need, chip), q.device, choices, general)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None, options: Options, rotated: bool,
) -> None:  # fmt: skip
    """The backward into ``dq``, ``dk``, ``dv`` and ``dbias``.

    With tables dq and dk are rotated back; ``rotated`` says that q and k come rotated already
    (always so in the general form), else the kernel rotates them.
    """
    total, heads, head_dim = q.shape
    if q.numel() == 0:
        return
    chip = _common.chip_of(q.device)
    need = options.need(q)
    narrow = choose.windowed_backward(need, chip)
    shared = {
        "QK_PIECES": pieces_of(head_dim, need.rope), "V_PIECES": pieces_of(head_dim),
        "ROPE": need.rope, "ROTATE": need.rope and not rotated, "WINDOWED": need.limited,
        "PEEL": peels(need), "HAS_DLSE": dlse is not None, **options.flags(q.dtype),
    }  # fmt: skip
    strides = (*row_strides(q, k, v, out, dout, dq, dk, dv), *options.table_strides())
    scalars = options.scale, options.threshold, options.keep_scale
    num_seqs = options.cu_seqlens.shape[0] - 1
    delta = _common.empty((0,) if narrow else (heads, total), torch.float32, q.device)

    def part(name: str, launch: Launch, tiles: Tensor, count: int, slots: int) -> None:
        _common.launch(
            backward_kernel, (slots * heads,), q, k, v, out, dout, lse, dlse, delta, dq, dk, dv,
            tiles, *options.pointers(), count, total, heads, *options.reach, *scalars, *strides,
            PART=name, **shared, **launch.constants(),
        )  # fmt: skip

    def windowed(launch: Launch) -> None:
        slots = _common.slots(total, num_seqs, launch.block_m)
        part("both", launch, options.cu_seqlens, num_seqs, slots)

    def general(launch: Launch) -> None:
        tiles = schedule(options.cu_seqlens, total, launch.block_m)
        part("dq", launch, tiles, tiles.shape[1], tiles.shape[1])
        part("dkv", launch, tiles, tiles.shape[1], tiles.shape[1])

    if narrow:
        _common.run_chosen(options.key("windowed_bwd", need, chip), q.device, narrow, windowed)
        return
    choices = choose.backward(need, chip)
    _common.run_chosen(options.key("attention_bwd", need, chip), q.device, choices, general)
    if dbias is not None:
        launch = choose.bias_gradient(need, chip)
        tiles = schedule(options.cu_seqlens, total, launch.block_m)
        constants = {
            "PIECES": shared["V_PIECES"], "WINDOWED": need.limited, "DROPOUT": need.dropout,
            "PRECISION": shared["PRECISION"],
        }  # fmt: skip
        bias_gradient(
            q, k, v, dout, lse, delta, tiles, options.reach, scalars, options.seed, options.bias,
            dbias, launch.block_m, launch.num_warps, constants,
        )  # fmt: skip


def varlen_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: int, right: int,
    scale: float, dropout_p: float, seed: Tensor | None, table: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total, heads, head_dim = q.shape
    check_head_dim(head_dim)
    out = _common.empty(q.shape, q.dtype, q.device)
    lse = _common.empty((heads, total), torch.float32, q.device)
    q, k, v = (_common.tile_rows(x) for x in (q, k, v))
    options = Options(
        _common.unit_rows(cu_seqlens), left, right, scale, dropout_p, seed, table
    )  # fmt: skip
    attend(q, k, v, out, lse, options)
    return out, lse


def varlen_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: int, right: int, scale: float,
    dropout_p: float, seed: Tensor | None, table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_head_dim(q.shape[2])
    dq, dk, dv = (_common.empty(x.shape, x.dtype, x.device) for x in (q, k, v))
    shape, dtype = ((0,), q.dtype) if table is None else (table.shape, table.dtype)
    dtable = _common.empty(shape, dtype, q.device)
    if q.numel() == 0:
        return dq, dk, dv, dtable.zero_()
    q, k, v, out, grad_out = (_common.tile_rows(x) for x in (q, k, v, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    options = Options(
        _common.unit_rows(cu_seqlens), left, right, scale, dropout_p, seed, table
    )  # fmt: skip
    attend_backward(
        q, k, v, out, grad_out, lse.contiguous(), grad_lse, dq, dk, dv,
        None if table is None else dtable, options, rotated=False,
    )  # fmt: skip
    return dq, dk, dv, dtable
