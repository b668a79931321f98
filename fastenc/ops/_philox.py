"""Philox 4x32-10 (Salmon et al., SC 2011): the dropout mask that every backend shares.

The element (query row r of the packed batch, key j of its sequence, head h) uses counter
``(j >> 2, r, h, 0)`` and key ``(seed low 32 bits, seed high 32 bits)``; its word is ``j & 3``, and
it is kept iff ``word >= floor(p * 2**32)``. Kept values are scaled by ``1 / (1 - p)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit values kept in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Four words in [0, 2**32), int64, from four broadcastable int64 counters."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _kept(counter: tuple[Tensor, ...], size: int, dropout_p: float, seed: Tensor) -> Tensor:
    """(..., size) bool of counters for four elements each, broadcast to (..., size / 4)."""
    words = torch.stack(torch.broadcast_tensors(*philox(counter, int(seed))), dim=-1)
    return words.flatten(-2)[..., :size] >= int(dropout_p * 2**32)


def keep_elements(count: int, dropout_p: float, seed: Tensor) -> Tensor:
    """(count,) bool: what dropout keeps of a tensor's elements, by their index i alone.

    Counter ``(16 (i >> 6) + (i & 15), 0, 0, 3)``, its first in two halves; word ``i >> 4 & 3``.
    """
    i = torch.arange((count + 63) // 64 * 16, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = torch.stack(philox((i & _MASK, i >> 32, zero, zero + 3), int(seed)))
    return words.view(4, -1, 16).transpose(0, 1).flatten()[:count] >= int(dropout_p * 2**32)


def keep_of_three(
    rows: Tensor, middle: int, size: int, tag: int, dropout_p: float, seed: Tensor
) -> Tensor:
    """(rows, middle, size) float64: 1 / (1 - p) where dropout keeps, else 0.

    Counter of the element (packed row, m, r): ``(r >> 2, row, m, tag)``, word ``r & 3``.
    """
    device = rows.device
    counter = (
        torch.arange((size + 3) // 4, device=device),
        rows.long().view(-1, 1, 1),
        torch.arange(middle, device=device).view(-1, 1),
        torch.full((), tag, dtype=torch.int64, device=device),
    )
    return _kept(counter, size, dropout_p, seed).double() / (1 - dropout_p)


def keep_mask(rows: Tensor, num_keys: int, heads: int, dropout_p: float, seed: Tensor) -> Tensor:
    """(heads, rows, num_keys) bool: what dropout keeps. ``rows``: packed row indices."""
    device = rows.device
    groups = torch.arange((num_keys + 3) // 4, device=device)
    counter = (
        groups.view(1, 1, -1),
        rows.long().view(1, -1, 1),
        torch.arange(heads, device=device).view(-1, 1, 1),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    return _kept(counter, num_keys, dropout_p, seed)
