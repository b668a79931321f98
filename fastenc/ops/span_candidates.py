"""The spans that pass a threshold, written as a list; the scores of the others are never stored.

start, end (words, R), labels (num_seqs, C, R), cu_words (num_seqs + 1,) -> word, width, label and
score, each (candidates,), where ``score = sigmoid(span_score(...)[word, width, label])`` is above
the threshold, in the order of (word, width, label). The product is :func:`span_score`'s; nothing of
size (words, max_width, C) is kept. The number of candidates is data: no gradient passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import lower_precision, statistics_dtype
from fastenc.ops._span_ref import candidates_forward
from fastenc.ops.span_pool import check_spans
from fastenc.ops.span_score import check_labels


def _forward_fake(start, end, labels, cu_words, max_width, threshold, label_bias):
    count = torch.library.get_ctx().new_dynamic_size()
    index = start.new_empty(count, dtype=torch.int64)
    score = statistics_dtype(start)
    return (
        index,
        torch.empty_like(index),
        torch.empty_like(index),
        start.new_empty(count, dtype=score),
    )


define(
    OpSpec(
        name="span_candidates",
        forward="(Tensor start, Tensor end, Tensor labels, Tensor cu_words, int max_width,"
        " float threshold, Tensor? label_bias)"
        " -> (Tensor word, Tensor width, Tensor label, Tensor score)",
        forward_fake=_forward_fake,
        forward_ref=candidates_forward,
        autocast=lower_precision(3, 6),
    )
)


def span_candidates(
    start: Tensor,
    end: Tensor,
    labels: Tensor,
    cu_words: Tensor,
    max_width: int,
    threshold: float,
    label_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spans and labels whose probability exceeds ``threshold``.

    Args:
        start, end, labels, cu_words, max_width, label_bias: as :func:`span_score` takes them.
        threshold: of the probability, in [0, 1].

    Returns:
        word, width, label: (candidates,) int64; the span is the packed words ``word`` to
            ``word + width``, inclusive, and lies within one sequence.
        score: (candidates,) float32 (float64 for float64 inputs), ``sigmoid(logit)``, from the
            logit in fp32: it is not rounded to the dtype of ``start`` on the way.
        Ordered by word, then width, then label.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or cu_words do not fit, or the threshold is
            no probability.
    """
    cu_words = check_spans(start, end, cu_words, max_width)
    check_labels(labels, label_bias, start, cu_words)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a float, got {type(threshold).__name__}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a probability in [0, 1], got {threshold}")
    bias = None if label_bias is None else label_bias.detach()
    return select("span_candidates", start)(
        start.detach(), end.detach(), labels.detach(), cu_words, max_width, float(threshold), bias
    )
