"""Scores of all short spans against labels, without ever writing the spans.

start, end (words, R), labels (num_seqs, C, R), cu_words (num_seqs + 1,) -> (words, max_width, C):

    out[i, w, c] = dropout(relu(start_i + end_{i + w})) . labels_c + label_bias_c

-inf where i + w is past the end of i's sequence. This is GLiNER's markerV0 head (Zaratiana et al.
2023, arXiv:2311.08526), folded: with out_project = W2 relu(W1 [relu(s_i); relu(e_j)] + b1) + b2,

    start_i = W1[:, :D] relu(s_i)          labels_c = W2^T prompt_c
    end_j   = W1[:, D:] relu(e_j) + b1     label_bias_c = b2 . prompt_c

fp32 arithmetic. The backward makes every row again; nothing of size (words, max_width, R) is kept.
Dropout: Philox counter ``(r >> 2, packed word row, w, 1)``, word ``r & 3`` (see ops/_philox.py).
"""

from __future__ import annotations

from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import lower_precision
from fastenc.ops._span_ref import score_backward, score_forward
from fastenc.ops.span_pool import check_spans
from fastenc.ops.varlen_attention import check_dropout


def _forward_fake(start, end, labels, cu_words, max_width, label_bias, dropout_p, seed):
    return start.new_empty(start.shape[0], max_width, labels.shape[1])


def _backward_fake(grad, start, end, labels, cu_words, max_width, dropout_p, seed):
    return (
        start.new_empty(start.shape),
        end.new_empty(end.shape),
        labels.new_empty(labels.shape),
        labels.new_empty(labels.shape[:2]),
    )


def _save(ctx, inputs, output):
    start, end, labels, cu_words, ctx.max_width, label_bias, ctx.dropout_p, seed = inputs
    ctx.has_bias = label_bias is not None
    ctx.save_for_backward(start, end, labels, cu_words, seed)


def _differentiate(ctx, bwd, grad):
    if grad is None:
        return (None,) * 8
    *tensors, seed = ctx.saved_tensors
    dstart, dend, dlabels, dbias = bwd(grad, *tensors, ctx.max_width, ctx.dropout_p, seed)
    return dstart, dend, dlabels, None, None, dbias if ctx.has_bias else None, None, None


_INPUTS = "Tensor start, Tensor end, Tensor labels, Tensor cu_words, int max_width"


define(
    OpSpec(
        name="span_score",
        forward=f"({_INPUTS}, Tensor? label_bias, float dropout_p, Tensor? seed) -> Tensor",
        backward=f"(Tensor grad, {_INPUTS}, float dropout_p, Tensor? seed)"
        " -> (Tensor dstart, Tensor dend, Tensor dlabels, Tensor dlabel_bias)",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=score_forward,
        backward_ref=score_backward,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(3, 5),
    )
)


def check_labels(
    labels: Tensor, label_bias: Tensor | None, start: Tensor, cu_words: Tensor
) -> None:
    """labels (num_seqs, C, R) and label_bias (num_seqs, C) or None, as the words have them."""
    num_seqs, size = cu_words.shape[0] - 1, start.shape[1]
    _checks.floating("labels", labels, 3)
    if labels.shape[0] != num_seqs or labels.shape[2] != size:
        raise ValueError(
            f"labels: expected (num_seqs = {num_seqs}, C, R = {size}), got {tuple(labels.shape)}"
        )
    named = [("labels", labels)]
    if label_bias is not None:
        _checks.floating("label_bias", label_bias, 2)
        if label_bias.shape != labels.shape[:2]:
            raise ValueError(
                f"label_bias: expected (num_seqs, C) = {tuple(labels.shape[:2])}, "
                f"got {tuple(label_bias.shape)}"
            )
        named.append(("label_bias", label_bias))
    for name, x in named:
        _checks.same_dtype(name, x, "start", start)
        _checks.same_device(name, x, "start", start)


def span_score(
    start: Tensor,
    end: Tensor,
    labels: Tensor,
    cu_words: Tensor,
    max_width: int,
    label_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Logits of every span of at most ``max_width`` words for every label of its sequence.

    Args:
        start, end: (words, R), one dtype: float32, bfloat16 or float16.
        labels: (num_seqs, C, R); one set for all sequences is ``labels.expand(num_seqs, C, R)``.
        cu_words: (num_seqs + 1,) int32, 0 to words.
        max_width: words in the longest span, at least 1.
        label_bias: (num_seqs, C), added to the logits.
        dropout_p: of the elements of ``relu(start_i + end_j)``, in [0, 1); ``seed`` (an int, or one
            int64 on the device; drawn from torch's generator if None) fixes the mask, the same on
            every backend.

    Returns:
        (words, max_width, C), dtype of ``start``; the autocast dtype under autocast. ``[i, w, c]``
        is the span from word i to word i + w; -inf past the end of the sequence, where the
        gradient is ignored.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or cu_words do not fit.
    """
    cu_words = check_spans(start, end, cu_words, max_width)
    check_labels(labels, label_bias, start, cu_words)
    seed = check_dropout(dropout_p, seed, start)
    return select("span_score", start)(
        start, end, labels, cu_words, max_width, label_bias, float(dropout_p), seed
    )
