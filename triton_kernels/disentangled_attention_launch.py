"""One call of disentangled attention as its kernels take it, and launches as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import Chip

MAX_HEAD_DIM = 128  # wider heads spill in every tile; DeBERTa's have 64


@dataclass(frozen=True)
class Launch:
    """A tile owns ``block_m`` rows and meets the other side in blocks of ``block_n``.

    ``maxnreg``: registers a thread may have, 0 for as many as ptxas likes; it would rather spill a
    few bytes than pass 128 or 168, where one block less fits.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int = 0

    def constants(self) -> dict[str, int]:
        limit = {"maxnreg": self.maxnreg} if self.maxnreg else {}
        return limit | {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n,
            "BAND": _common.power_of_2(self.block_m + self.block_n - 1),
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What a launch may depend on beside the chip: nothing that changes with the batch."""

    head_dim: int
    dtype: torch.dtype
    terms: int
    dropout: bool

    @property
    def fp32(self) -> bool:
        return self.dtype == torch.float32


Launches = tuple[Launch, ...]
INTERPRETED = (Launch(16, 16, 4),)


def _tall(need: Need, chip: Chip) -> bool:
    """Whether tiles of 64 x 64 are right: tcgen05 needs them and keeps its sums out of registers.
    Elsewhere on NVIDIA they spill where there is a table (compiled, not timed)."""
    return chip.backend == "cuda" and (100 <= chip.arch < 120 or not need.terms)


def _fp32(need: Need, chip: Chip) -> Launch:
    """The operands of an FMA product are in registers: 32 x 32 tiles spill."""
    if chip.backend == "hip":  # 8 warps are more threads than scores: Triton fails in tl.gather
        return Launch(16, 16, 4)
    return Launch(16, 16, 4 if need.head_dim <= 64 else 8, maxnreg=255)


def forward(need: Need, chip: Chip) -> Launches:
    if chip.backend == "cpu":
        return INTERPRETED
    if need.fp32:
        return (_fp32(need, chip),)
    if _tall(need, chip) or chip.backend == "hip":
        return (Launch(64, 64, 8), Launch(64, 64, 4))
    return (Launch(32, 32, 4), Launch(32, 32, 8)) if need.head_dim <= 64 else (Launch(32, 32, 8),)


def backward(need: Need, chip: Chip) -> Launches:
    """dq, and dk with dv."""
    if chip.backend == "cpu":
        return INTERPRETED
    if need.fp32:
        return (_fp32(need, chip),)
    if _tall(need, chip):
        return (Launch(64, 64 if need.terms or need.head_dim <= 64 else 32, 8),)
    if chip.backend == "hip":  # 64 x 64 tiles are past its shared memory
        return (Launch(32, 32, 4),)
    return (Launch(32, 32, 4), Launch(32, 32, 8)) if need.head_dim <= 64 else (Launch(32, 32, 8),)


def tables(need: Need, chip: Chip) -> Launch:
    """The gradient of the tables: square tiles."""
    if chip.backend == "cpu":
        return INTERPRETED[0]
    if need.fp32:
        return _fp32(need, chip)
    if _tall(need, chip):
        return Launch(64, 64, 8)
    if chip.backend == "hip":
        return Launch(32, 32, 4)
    # Wider heads spill in 32 x 32 tiles, and on Triton 3.6 without maxnreg, at 168 registers.
    return Launch(32, 32, 8) if need.head_dim <= 64 else Launch(16, 16, 4, maxnreg=255)


def chunks(heads: int, kinds: int, chip: Chip) -> int:
    """Into how many parts the tiles of one offset are cut so that the chip is filled."""
    return max(1, min(8, triton.cdiv(4 * chip.multiprocessors, max(heads * kinds, 1))))


@dataclass(frozen=True)
class Call:
    """The arguments of a call, made ready: rows with unit stride, tables or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos_key: Tensor | None
    pos_query: Tensor | None
    rel_index: Tensor
    cu_seqlens: Tensor
    scale: float
    dropout_p: float
    seed: Tensor | None

    @staticmethod
    def of(q, k, v, pos_key, pos_query, rel_index, cu_seqlens, scale, dropout_p, seed) -> Call:
        if q.shape[2] > MAX_HEAD_DIM:
            raise NotImplementedError(
                f"disentangled_attention: the Triton kernels serve head_dim up to {MAX_HEAD_DIM}, "
                f"got {q.shape[2]}"
            )
        q, k, v = (_common.tile_rows(x) for x in (q, k, v))
        rows = (None if x is None else _common.unit_rows(x) for x in (pos_key, pos_query))
        cu = _common.unit_rows(cu_seqlens)
        return Call(q, k, v, *rows, rel_index.contiguous(), cu, scale, dropout_p, seed)

    @property
    def total(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def radius(self) -> int:
        return self.rel_index.shape[0] // 2

    @property
    def chip(self) -> Chip:
        return _common.chip_of(self.q.device)

    @property
    def need(self) -> Need:
        terms = (self.pos_key is not None) + (self.pos_query is not None)
        return Need(self.q.shape[2], self.q.dtype, terms, self.dropout_p > 0)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.pos_key, self.pos_query

    @property
    def scalars(self) -> tuple:
        """total_tokens, heads, radius, scale, threshold, keep_scale."""
        threshold, keep_scale = int(self.dropout_p * 2**32), 1.0 / (1.0 - self.dropout_p)
        return self.total, self.heads, self.radius, self.scale, threshold, keep_scale

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(s for x in self.inputs for s in ((0, 0) if x is None else x.stride()[:2]))

    @property
    def flags(self) -> dict:
        width = _common.power_of_2(max(self.q.shape[2], 16))  # one piece: two spill
        return {
            "PIECES": ((0, width, self.q.shape[2]),), "C2P": self.pos_key is not None,
            "P2C": self.pos_query is not None, "DROPOUT": self.dropout_p > 0,
            "PRECISION": _common.precision(self.q.dtype),
        }  # fmt: skip

    def key(self, part: str) -> tuple:
        """What a tuned launch depends on."""
        return (f"disentangled_{part}", *vars(self.need).values(), self.chip.name)
