"""Launch choice of the attention kernels: plain data from (need, chip), the default first.

Four families of chip: CUDA from sm_90 on with its large shared memory (wgmma, tcgen05), other CUDA
(mma.sync keeps operands in registers, so tiles are smaller), HIP (512 registers a thread, 64 KB of
shared memory), and the interpreter. Register figures are those of sm_90, bf16, head_dim 64, unless
a line says otherwise, as ``make gates`` prints them: 128 and fewer let two blocks of 8 warps share
a multiprocessor, 255 is the most a thread may have, and no choice for sm_90 spills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from fastenc.triton_kernels._common import Chip


@dataclass(frozen=True)
class Launch:
    """A tile owns ``block_m`` rows and meets the other side in blocks of ``block_n``."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What a launch may depend on beside the chip: nothing that changes with the batch."""

    head_dim: int
    dtype: torch.dtype
    left: int = -1
    right: int = -1
    rope: bool = False
    dropout: bool = False
    bias: bool = False

    @property
    def limited(self) -> bool:
        return self.left >= 0 or self.right >= 0

    @property
    def narrow(self) -> bool:
        """A window on both sides, whose kernels have no bias (no model has both)."""
        return self.left >= 0 and self.right >= 0 and not self.bias

    @property
    def extras(self) -> bool:
        """Dropout and bias each take some 40 registers."""
        return self.dropout or self.bias

    @property
    def fp32(self) -> bool:
        return self.dtype == torch.float32


Launches = tuple[Launch, ...]
INTERPRETED = Launch(32, 16, 4)
INTERPRETED_NARROW = Launch(16, 16, 4)


def _large(chip: Chip) -> bool:
    return chip.backend == "cuda" and chip.arch >= 90 and chip.shared > 160_000


def window_low(left: int) -> int:
    """The first key of a tile relative to its first row: a multiple of 16 at or below -left."""
    return -triton.cdiv(left, 16) * 16


def window_blocks(left: int, right: int, block_m: int, block_n: int) -> int:
    """How many blocks of keys the rows of a tile can see."""
    return triton.cdiv(block_m + right - window_low(left), block_n)


def forward(need: Need, chip: Chip) -> Launches:
    """The general forward: 124 registers, 142 with RoPE, 170 with dropout, 177 with bias."""
    if chip.backend == "cpu":
        return (INTERPRETED,)
    if need.fp32:  # 4 warps spill at head_dim 128
        return (Launch(32, 32 if need.head_dim <= 128 else 16, 8, 2),)
    if need.head_dim > 128:  # a second stage takes 68 KB of shared memory
        return (Launch(64, 32, 8, 1 if chip.backend == "hip" else 2),)
    if chip.backend == "hip":  # 64 KB of shared memory hold two stages
        return (Launch(128, 64 if need.head_dim <= 64 else 32, 4, 2),)
    if need.head_dim > 64 and not _large(chip):  # (128, 64) spills with extras
        return (Launch(128, 32, 8, 2),)
    if need.dropout and need.bias:  # 64 keys take all registers, and spill at head_dim 32
        return (Launch(128, 32, 8, 2),)
    # (128, 64) spills 728 bytes on sm_100, and 120 with a bias on sm_90 with Triton 3.9.
    if need.head_dim > 64 and (need.bias or (need.dropout and chip.arch >= 100)):
        return (Launch(128, 32, 8, 2),)
    return (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(128, 32, 8, 2))


def backward(need: Need, chip: Chip) -> Launches:
    """The general backward, both parts (dq, and dk with dv)."""
    if chip.backend == "cpu":
        return (INTERPRETED,)
    if need.fp32:
        if chip.backend == "hip":  # 8 warps spill
            return (Launch(32, 32, 4, 1),)
        if need.dropout and need.bias and need.head_dim <= 128:  # 32 spill 8 bytes on Triton 3.6
            return (Launch(32, 16, 8, 2),)
        return (Launch(32, 32, 8, 2) if need.head_dim <= 128 else Launch(16, 16, 8, 2),)
    if need.head_dim > 128:
        if chip.backend == "hip":  # 64 rows take 72 KB of shared memory
            return (Launch(32, 16, 4, 1),)
        if chip.arch >= 100:
            return (Launch(64, 16, 8, 2),)
        return (Launch(32, 32, 8, 2),)  # 64 rows spill on Triton 3.9, with extras everywhere
    if chip.backend == "hip":
        one_stage = need.head_dim > 64 and need.extras
        return (Launch(64, 32, 4, 1 if one_stage else 2),)
    if need.head_dim <= 64:
        if need.dropout and need.bias:  # 4 warps spill 8 bytes on sm_80
            return (Launch(64, 32, 8, 2),)
        small = Launch(64, 32, 4, 2)  # dk and dv: 140 registers, 183 with dropout
        if need.extras:
            return (small,)
        return (Launch(64, 64, 4, 2), small)  # dq 157, dk and dv 224
    if not _large(chip):  # 32 spill with a bias, and at head_dim 128
        return (Launch(128, 16 if need.bias or need.head_dim > 96 else 32, 8, 2),)
    if need.extras:  # (128, 32) spills, and (64, 32) with dropout and bias together on Triton 3.9
        return (Launch(64, 16 if need.dropout and need.bias else 32, 8, 2),)
    return (Launch(128, 32, 8, 2), Launch(64, 32, 8, 2))


def windowed_forward(need: Need, chip: Chip) -> Launches:
    """The single-pass forward, for windows of at most two tiles; none where it does not pay."""
    choices = _windowed_forward(need, chip) if need.narrow else ()

    def fits(launch: Launch) -> bool:
        blocks = window_blocks(need.left, need.right, launch.block_m, launch.block_n)
        return blocks * launch.block_n <= 3 * launch.block_m

    return tuple(filter(fits, choices))


def _windowed_forward(need: Need, chip: Chip) -> Launches:
    if chip.backend == "cpu":
        return (INTERPRETED_NARROW,)
    if need.fp32 or need.head_dim > 128:
        return ()
    wide = Launch(64, 64, 4)  # 168 registers, 203 with RoPE, 249 with RoPE and dropout
    if chip.backend == "hip":
        return (wide,) if need.head_dim <= 64 else ()
    if not _large(chip):
        if need.head_dim > 64 or (need.rope and need.dropout):  # spill
            return ()
        return (Launch(64, 32, 4),) if need.rope else (wide,)
    if need.head_dim <= 64:
        return (wide, Launch(64, 64, 8))
    return () if need.dropout else (Launch(64, 64, 8),)  # 205 registers at head_dim 96


def windowed_backward(need: Need, chip: Chip) -> Launches:
    """The one-kernel backward; none where it does not pay."""
    if not need.narrow or need.left + need.right > 256:
        return ()
    if chip.backend == "cpu":
        return (INTERPRETED_NARROW,)
    if need.fp32 or need.head_dim > 128:
        return ()
    small = Launch(64, 16, 4, 2)  # 160 registers with RoPE, 211 with RoPE and dropout
    if need.head_dim <= 64:
        if need.rope and (need.dropout or (chip.backend == "cuda" and not _large(chip))):
            return (small,)
        return (Launch(64, 32, 4, 2), small)  # 166 registers, 184 with RoPE, 199 with dropout
    if not _large(chip) or need.dropout:  # spills
        return ()
    # 235 registers with RoPE at head_dim 96; at 128 they spill on Triton 3.6.
    return (Launch(64, 16 if need.rope and need.head_dim > 96 else 32, 8, 2),)


def bias_gradient(need: Need, chip: Chip) -> Launch:
    """The table's gradient: square blocks."""
    if chip.backend == "cpu":
        return Launch(32, 32, 4)
    if need.fp32:  # 4 warps spill 8 bytes at 56 registers with dropout
        return Launch(16, 16, 2)
    return Launch(64, 64, 8) if need.head_dim <= 64 or _large(chip) else Launch(32, 32, 4)


def peels(need: Need) -> bool:
    """Whether only the last block of keys is masked, apart from the loop.

    Not in fp32: its products are made of FMAs whose operands the compiler keeps in registers, and
    a second copy of the step spills up to 2.5 KB. Nor in heads wider than 128: up to 0.5 KB on
    Triton 3.9.
    """
    return not (need.limited or need.fp32 or need.head_dim > 128)
