"""Plain PyTorch kernels of the span ops: the specification the other backends are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastenc.ops._philox import keep_of_three
from fastenc.ops._rules import sequences, wide

SPAN_TAG = 1


def _ends(length: int, max_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(length, max_width): the last word of each span, 0 where there is none, and whether it is."""
    ends = torch.arange(length, device=device)[:, None] + torch.arange(max_width, device=device)
    return ends.masked_fill(ends >= length, 0), ends < length


def span_keep(rows: Tensor, max_width: int, size: int, dropout_p: float, seed: Tensor) -> Tensor:
    """(rows, max_width, size): 1 / (1 - p) where dropout keeps, else 0.

    Philox counter of the element (packed word row, width w, r): ``(r >> 2, row, w, 1)``, word
    ``r & 3``; it is kept iff the word is at least ``floor(p * 2**32)``.
    """
    return keep_of_three(rows, max_width, size, SPAN_TAG, dropout_p, seed)


def span_pool_ref(start: Tensor, end: Tensor, cu_words: Tensor, max_width: int) -> Tensor:
    """Differentiable specification at the dtype of ``start``: (words, max_width, R)."""
    spans = [start.new_zeros(0, max_width, start.shape[1])]
    for _, words in sequences(cu_words):
        ends, exists = _ends(words.stop - words.start, max_width, start.device)
        pooled = F.relu(start[words].unsqueeze(1) + end[words][ends])
        spans.append(pooled.masked_fill(~exists.unsqueeze(-1), 0.0))
    return torch.cat(spans)


def pool_forward(start, end, cu_words, max_width):
    return span_pool_ref(wide(start), wide(end), cu_words, max_width).to(start.dtype)


def pool_backward(grad, start, end, cu_words, max_width):
    a, b, g = wide(start), wide(end), wide(grad)
    dstart, dend = torch.zeros_like(a), torch.zeros_like(b)
    for _, words in sequences(cu_words):
        ends, exists = _ends(words.stop - words.start, max_width, a.device)
        active = (a[words].unsqueeze(1) + b[words][ends] > 0) & exists.unsqueeze(-1)
        d = g[words].masked_fill(~active, 0.0)
        dstart[words] = d.sum(1)
        dend[words] = dend[words].index_add(0, ends.flatten(), d.flatten(0, 1))
    return dstart.to(start.dtype), dend.to(end.dtype)


def span_score_ref(
    start: Tensor,
    end: Tensor,
    labels: Tensor,
    cu_words: Tensor,
    max_width: int,
    label_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Differentiable specification at the dtype of ``start``: (words, max_width, C)."""
    logits = [start.new_zeros(0, max_width, labels.shape[1])]
    for seq, words in sequences(cu_words):
        ends, exists = _ends(words.stop - words.start, max_width, start.device)
        spans = F.relu(start[words].unsqueeze(1) + end[words][ends])
        if dropout_p > 0:
            rows = torch.arange(words.start, words.stop, device=start.device)
            keep = span_keep(rows, max_width, start.shape[1], dropout_p, seed)
            spans = spans * keep.to(spans.dtype)
        scores = spans @ labels[seq].T
        if label_bias is not None:
            scores = scores + label_bias[seq]
        logits.append(scores.masked_fill(~exists.unsqueeze(-1), float("-inf")))
    return torch.cat(logits)


def score_forward(start, end, labels, cu_words, max_width, label_bias, dropout_p, seed):
    bias = None if label_bias is None else wide(label_bias)
    return span_score_ref(
        wide(start), wide(end), wide(labels), cu_words, max_width, bias, dropout_p, seed
    ).to(start.dtype)


def score_backward(grad, start, end, labels, cu_words, max_width, dropout_p, seed):
    a, b, v, g = wide(start), wide(end), wide(labels), wide(grad)
    da, db, dv = torch.zeros_like(a), torch.zeros_like(b), v.new_zeros(v.shape)
    dbias = v.new_zeros(v.shape[:2])
    for seq, words in sequences(cu_words):
        ends, exists = _ends(words.stop - words.start, max_width, a.device)
        exists = exists.unsqueeze(-1)
        spans = F.relu(a[words].unsqueeze(1) + b[words][ends])
        factor = (spans > 0).to(spans.dtype)
        if dropout_p > 0:
            rows = torch.arange(words.start, words.stop, device=a.device)
            keep = span_keep(rows, max_width, a.shape[1], dropout_p, seed).to(spans.dtype)
            spans, factor = spans * keep, factor * keep
        dlogits = g[words].masked_fill(~exists, 0.0)
        dv[seq] = torch.einsum("ikc,ikr->cr", dlogits, spans)
        dbias[seq] = dlogits.sum((0, 1))
        d = (dlogits @ v[seq]) * factor
        da[words] = d.sum(1)
        db[words] = db[words].index_add(0, ends.flatten(), d.flatten(0, 1))
    dtype = start.dtype
    return da.to(dtype), db.to(dtype), dv.to(dtype), dbias.to(dtype)


def span_candidates_ref(
    start: Tensor,
    end: Tensor,
    labels: Tensor,
    cu_words: Tensor,
    max_width: int,
    threshold: float,
    label_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """word, width, label, score, from the logits in memory; scores at the dtype of ``start``."""
    longest = max((words.stop - words.start for _, words in sequences(cu_words)), default=0)
    logits = span_score_ref(start, end, labels, cu_words, min(max_width, longest), label_bias)
    scores = torch.sigmoid(logits)
    word, width, label = ((scores > threshold) & (logits > float("-inf"))).nonzero(as_tuple=True)
    return word, width, label, scores[word, width, label]


def candidates_forward(start, end, labels, cu_words, max_width, threshold, label_bias):
    bias = None if label_bias is None else wide(label_bias)
    *found, score = span_candidates_ref(
        wide(start), wide(end), wide(labels), cu_words, max_width, threshold, bias
    )
    return *(index.clone() for index in found), score  # the indices are views of one tensor
