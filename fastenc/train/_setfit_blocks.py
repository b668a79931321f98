"""Block pairing: m distinct texts encoded once give m (m - 1) / 2 pairs.

setfit encodes 2 texts a pair: a batch of 16 pairs is 32 encodings. A block of 16 texts is 16
encodings and 120 pairs. The loss of a block is setfit's in expectation:

    share of positive pairs * mean over positives + share of negative pairs * mean over negatives

with the shares that the sampling strategy draws, computed from the m x m cosines: no pair exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 16
FEWEST_STEPS = 40
"""Below this many steps block pairing takes as many as exact pairing would."""
TEXTS_A_CLASS = 4
"""Blocks of fewer texts a class than this are filled class by class, two texts each, so that every
block has positive pairs."""


@dataclass(frozen=True)
class Plan:
    """A schedule: ``steps`` blocks of ``block_size`` texts, learning rate times ``rate_factor``."""

    block_size: int
    steps: int
    rate_factor: float


def plan(
    texts: int,
    exact_steps: int,
    batch_size: int,
    block_size: int | None = None,
    steps: int | None = None,
) -> Plan:
    """How block pairing spends less than ``exact_steps`` batches of ``batch_size`` pairs.

    Every pair is seen as often as in exact pairing, on average, but in no fewer steps than
    ``FEWEST_STEPS``: the step count falls by the ratio of pairs in a block to pairs in a batch. The
    learning rate grows with the square root of the ratio of steps (Malladi et al. 2022,
    arXiv:2205.10287: Adam's scaling rule).

    Args:
        texts: distinct texts.
        block_size, steps: from the arguments, or None.
    """
    size = min(block_size or BLOCK_SIZE, texts)
    if steps is None:
        by_pairs = math.ceil(exact_steps * batch_size / max(1, size * (size - 1) // 2))
        steps = max(by_pairs, min(exact_steps, FEWEST_STEPS))
    return Plan(size, steps, math.sqrt(max(1.0, exact_steps / max(1, steps))))


def blocks(n: int, labels: np.ndarray | None, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless blocks of distinct texts out of ``n``; each text once before any a second time.

    Args:
        labels: (n,), (n, outputs), or None (distillation).
        size: texts in a block, at most ``n``.
    """
    paired = labels is not None and labels.ndim == 1 and needs_pairing(labels, size)
    rng = np.random.default_rng(seed)
    left = np.empty(0, np.int64)
    while True:
        while len(left) < size:
            fresh = _in_twos(labels, rng) if paired else rng.permutation(n)
            seen = np.isin(fresh, left)
            # a text still waiting in `left` goes to the end of the fresh round
            left = np.concatenate([left, fresh[~seen], fresh[seen]])
        block, left = left[:size], left[size:]
        yield np.unique(block)


def needs_pairing(labels: np.ndarray, size: int) -> bool:
    """Whether a random block would have few positive pairs."""
    return size < TEXTS_A_CLASS * len(np.unique(labels))


def _in_twos(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation in which texts of a class stand two by two."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    twos = []
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        twos += np.split(members, range(2, len(members), 2))
    return np.concatenate([twos[i] for i in rng.permutation(len(twos))])


def pair_weights(same: Tensor, positive_share: float, class_weight: Tensor | None) -> Tensor:
    """(m, m) weights of the pairs i < j; 0 elsewhere. Of sum 1, less where a kind is missing.

    Args:
        same: (m, m) bool.
        positive_share: of the sum.
        class_weight: (m,) relative weight of a positive pair, by its first text, or None.
    """
    upper = torch.ones_like(same).triu(1)
    positive = (same & upper).float()
    negative = (~same & upper).float()
    if class_weight is not None:
        positive = positive * class_weight.unsqueeze(1)
    weight = positive * (positive_share / positive.sum().clamp(min=1e-12))
    return weight + negative * ((1 - positive_share) / negative.sum().clamp(min=1))


def class_weights(labels: np.ndarray, size: int) -> np.ndarray | None:
    """(n,) weight of a text's positive pairs where blocks are filled two by two, or None.

    There a class gets pairs by its texts; setfit draws them by its pairs: (n_c - 1) times as many.
    """
    if labels.ndim != 1 or not needs_pairing(labels, size):
        return None
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.maximum(sizes[place] - 1, 1).astype(np.float32)
