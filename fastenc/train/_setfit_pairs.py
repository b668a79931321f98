"""setfit's pairs, as two index arrays: which, in which order, how often.

setfit 1.2 walks all pairs i <= j (a text with itself too) in the order of one fixed permutation,
sorts them into positive and negative, takes as many of each as the sampling strategy says (from the
start again where there are too few), alternates them, and shuffles the rows anew in every epoch.
It holds every pair as a row of two strings; here a pair is two int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SETFIT_SEED = 42
"""setfit's permutation of the pairs does not depend on the arguments."""


@dataclass(frozen=True)
class Counts:
    """How many pairs: all distinct ones, and those that an epoch draws."""

    positive: int
    negative: int
    drawn_positive: int
    drawn_negative: int

    @property
    def drawn(self) -> int:
        return self.drawn_positive + self.drawn_negative

    @property
    def positive_share(self) -> float:
        """Of the drawn pairs."""
        return self.drawn_positive / max(1, self.drawn)


@dataclass(frozen=True)
class Pairs:
    """An epoch's unshuffled pairs: indices of texts ``first``, ``second`` (n,), ``target`` (n,)."""

    first: np.ndarray
    second: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def positives(labels: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """bool (n,): texts i and j share their label, or, with labels (texts, outputs), one of them."""
    if labels.ndim == 1:
        return labels[i] == labels[j]
    return (labels[i].astype(bool) & labels[j].astype(bool)).any(1)


def counts(labels: np.ndarray, sampling_strategy: str, num_iterations: int | None = None) -> Counts:
    """The sizes of :func:`pairs` without making them. ``labels`` (n,) or (n, outputs)."""
    n = len(labels)
    everything = n * (n + 1) // 2
    if labels.ndim == 1:
        sizes = np.unique(labels, return_counts=True)[1].astype(np.int64)
        same = int((sizes * (sizes + 1) // 2).sum())
    else:
        shared = (labels.astype(np.int32) @ labels.astype(np.int32).T) > 0
        same = int(np.triu(shared).sum())
    return _counts(same, everything - same, n, sampling_strategy, num_iterations)


def _counts(same: int, other: int, n: int, strategy: str, iterations: int | None) -> Counts:
    if iterations is not None and iterations > 0:
        drawn = (iterations * n,) * 2
        drawn = tuple(take if have else 0 for take, have in zip(drawn, (same, other), strict=True))
    elif strategy == "unique":
        drawn = same, other
    elif strategy == "undersampling":
        drawn = (min(same, other),) * 2
    else:
        drawn = (max(same, other) if same else 0, max(same, other) if other else 0)
    return Counts(same, other, *drawn)


def pairs(
    labels: np.ndarray,
    sampling_strategy: str,
    num_iterations: int | None = None,
    max_pairs: int = -1,
) -> Pairs:
    """setfit's ``ContrastiveDataset`` over texts 0 .. n-1.

    Args:
        labels: (n,), or (n, outputs) of 0 and 1.
        sampling_strategy, num_iterations: see the training arguments.
        max_pairs: if positive, half as many positive and negative pairs suffice.
    """
    i, j = _all_pairs(len(labels))
    same = positives(labels, i, j)
    kinds = []
    for kind in (same, ~same):
        rows = np.flatnonzero(kind)
        kinds.append(rows if max_pairs == -1 else rows[: max_pairs // 2])
    have = [len(rows) for rows in kinds]
    size = _counts(*have, len(labels), sampling_strategy, num_iterations)
    drawn = size.drawn_positive, size.drawn_negative
    rows = [
        np.resize(kind, take) if take else kind[:0] for kind, take in zip(kinds, drawn, strict=True)
    ]
    order = _alternate(*rows)
    return Pairs(i[order], j[order], same[order].astype(np.float32))


def distillation_pairs(
    similarity: np.ndarray, num_iterations: int | None = None, max_pairs: int = -1
) -> Pairs:
    """Every pair with the teacher's cosine as its target.

    Args:
        similarity: (n, n), the teacher's cosines. (setfit 1.2 reads the wrong rows here: every
            target is ``similarity[0, 0]``.)
    """
    i, j = _all_pairs(len(similarity))
    if max_pairs != -1:
        i, j = i[: max_pairs // 2 + 1], j[: max_pairs // 2 + 1]
    if num_iterations is not None and num_iterations > 0:
        take = num_iterations * len(similarity)
        i, j = np.resize(i, take), np.resize(j, take)
    return Pairs(i, j, similarity[i, j].astype(np.float32))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) the rows of an epoch as sentence-transformers' trainer (accelerate's sampler) visits."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(n, generator=generator).numpy()


def _all_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 i <= j in the order of setfit's permutation."""
    i, j = (index.astype(np.int32) for index in np.triu_indices(n))
    order = np.random.RandomState(seed=SETFIT_SEED).permutation(len(i))
    return i[order], j[order]


def _alternate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a0 b0 a1 b1 ..., then what is left of the longer."""
    both = min(len(a), len(b))
    mixed = np.stack([a[:both], b[:both]], axis=1).reshape(-1)
    return np.concatenate([mixed, a[both:], b[both:]])
