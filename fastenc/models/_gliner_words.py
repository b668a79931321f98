"""Logits of a packed batch to entities in words: what evaluation compares with annotations."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from fastenc import _C
from fastenc.models._gliner_batch import GLiNERBatch

WordEntity = tuple[int, int, int, float]
"""First word, last word (inclusive), label, probability."""


@torch.no_grad()
def entities_in_words(
    logits: Tensor,
    batch: GLiNERBatch,
    num_labels: list[int],
    token_level: bool,
    threshold: float = 0.5,
    flat_ner: bool = True,
    multi_label: bool = False,
) -> list[list[WordEntity]]:
    """The entities of each sequence, chosen as ``GLiNER.inference`` chooses them.

    Args:
        logits: of ``GLiNER.logits``: (words, max_width, C), or (words, C, 3) of a token model.
        num_labels: labels of each sequence; further columns are ignored.
        token_level: what the logits are.
    """
    probability = torch.sigmoid(logits.float()).cpu().numpy()
    edges = [0, *itertools.accumulate(batch.word_lengths)]
    columns: list[tuple[np.ndarray, ...]] = []
    for count, (first, stop) in zip(num_labels, itertools.pairwise(edges), strict=True):
        rows = probability[first:stop]
        if token_level:
            part = np.ascontiguousarray(rows[:, :count])
            inner = np.array([0, len(part)])
            columns.append(_C.token_spans(part, inner, np.array([count]), threshold)[:4])
        else:
            start, width, label = np.nonzero(rows[..., :count] > np.float32(threshold))
            columns.append((start, start + width, label, rows[start, width, label]))
    cuts = np.array([0, *itertools.accumulate(len(c[0]) for c in columns)])
    start, end, label, score = (np.concatenate(x) for x in zip(*columns, strict=True))
    chosen, kept = _C.select_spans(start, end, score, cuts, flat_ner, multi_label)
    rows = list(zip(*(x[chosen].tolist() for x in (start, end, label, score)), strict=True))
    return [rows[a:b] for a, b in itertools.pairwise(kept.tolist())]
