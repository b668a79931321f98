"""Logits of a packed batch to flat entities in words, for evaluation.

gliner's greedy search (0.2.29, decoding/decoder.py): candidates by falling score, none that
overlaps one before it.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

WordEntity = tuple[int, int, int, float]
"""First word, last word (inclusive), label, probability."""


@torch.no_grad()
def entities_in_words(
    logits: Tensor,
    word_lengths: list[int],
    num_labels: list[int],
    token_level: bool,
    threshold: float = 0.5,
) -> list[list[WordEntity]]:
    """The entities of each sequence, by first word.

    Args:
        logits: of ``GLiNER.logits``: (words, max_width, C), or (words, C, 3) of a token model.
        word_lengths, num_labels: of each sequence; columns past its labels are ignored.
    """
    probability = torch.sigmoid(logits.float()).cpu().numpy()
    edges = [0, *itertools.accumulate(word_lengths)]
    found = []
    for count, (first, stop) in zip(num_labels, itertools.pairwise(edges), strict=True):
        rows = probability[first:stop]
        if token_level:
            candidates = _token_candidates(rows[:, :count], threshold)
        else:
            rows = rows[..., :count]
            start, width, label = np.nonzero(rows > threshold)
            scores = rows[start, width, label]
            candidates = list(
                zip(*(x.tolist() for x in (start, start + width, label, scores)), strict=True)
            )
        found.append(_flat(candidates))
    return found


def _token_candidates(rows: np.ndarray, threshold: float) -> list[WordEntity]:
    """Of (words, C, 3): a start, an end behind it, and every word between them inside."""
    found = []
    for word, label in zip(
        *(x.tolist() for x in np.nonzero(rows[..., 0] > threshold)), strict=True
    ):
        least = float(rows[word, label, 0])
        for last in range(word, len(rows)):
            inside, end = float(rows[last, label, 2]), float(rows[last, label, 1])
            if inside < threshold:
                break
            least = min(least, inside)
            if end > threshold:
                found.append((word, last, label, min(least, end)))
    return found


def _flat(candidates: list[WordEntity]) -> list[WordEntity]:
    chosen: list[WordEntity] = []
    for one in sorted(candidates, key=lambda c: -c[3]):
        if all(one[1] < other[0] or one[0] > other[1] for other in chosen):
            chosen.append(one)
    return sorted(chosen)
