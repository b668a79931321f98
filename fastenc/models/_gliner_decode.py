"""Logits of a packed batch to flat entities in words, for evaluation.

gliner's greedy search (0.2.29, decoding/decoder.py), by csrc/host/entities.cpp.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from fastenc import _C

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
    edges = np.array([0, *itertools.accumulate(word_lengths)])
    if token_level:
        start, end, label, score, cuts = _C.token_spans(
            probability, edges, np.array(num_labels), threshold
        )
    else:
        used = np.repeat(num_labels, word_lengths)
        exists = np.arange(probability.shape[2]) < used[:, None, None]
        word, width, label = np.nonzero((probability > threshold) & exists)
        score = probability[word, width, label]
        cuts = np.searchsorted(word, edges)
        start = word - np.repeat(edges[:-1], np.diff(cuts))
        end = start + width
    chosen, cuts = _C.select_spans(start, end, score, cuts, True, False)
    rows = list(zip(*(x[chosen].tolist() for x in (start, end, label, score)), strict=True))
    return [rows[first:stop] for first, stop in itertools.pairwise(cuts.tolist())]
