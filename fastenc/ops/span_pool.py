"""Span pooling: one row for each span of at most ``max_width`` words of a packed sequence.

start, end (words, R), cu_words (num_seqs + 1,) -> (words, max_width, R):

    out[i, w] = relu(start_i + end_{i + w})       zeros where i + w is past the end of i's sequence

GLiNER's markerV0 (Zaratiana et al. 2023, arXiv:2311.08526) after its first linear layer is split in
two: ``start_i = W[:, :D] relu(s_i)``, ``end_j = W[:, D:] relu(e_j) + b``. Only for who needs the
rows themselves: :func:`span_score` multiplies them by the labels without ever writing them.
"""

from __future__ import annotations

from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import lower_precision
from fastenc.ops._span_ref import pool_backward, pool_forward


def _forward_fake(start, end, cu_words, max_width):
    return start.new_empty(start.shape[0], max_width, start.shape[1])


def _backward_fake(grad, start, end, cu_words, max_width):
    return start.new_empty(start.shape), end.new_empty(end.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_width = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, bwd, grad):
    if grad is None:
        return None, None, None, None
    return *bwd(grad, *ctx.saved_tensors, ctx.max_width), None, None


define(
    OpSpec(
        name="span_pool",
        forward="(Tensor start, Tensor end, Tensor cu_words, int max_width) -> Tensor",
        backward="(Tensor grad, Tensor start, Tensor end, Tensor cu_words, int max_width)"
        " -> (Tensor dstart, Tensor dend)",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=pool_forward,
        backward_ref=pool_backward,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(2),
    )
)


def check_spans(start: Tensor, end: Tensor, cu_words: Tensor, max_width: int) -> Tensor:
    """What every span op asks of its words; cu_words as the kernels take it."""
    _checks.floating("start", start, 2)
    _checks.floating("end", end, 2)
    _checks.same_dtype("end", end, "start", start)
    _checks.same_device("end", end, "start", start)
    if end.shape != start.shape:
        raise ValueError(
            f"end: expected the shape of start {tuple(start.shape)}, got {tuple(end.shape)}"
        )
    cu_words = _checks.cu_seqlens("cu_words", cu_words, start.shape[0], start)
    if isinstance(max_width, bool) or not _checks.is_int(max_width):
        raise TypeError(f"max_width: expected an int, got {type(max_width).__name__}")
    if max_width < 1:
        raise ValueError(f"max_width: expected at least 1, got {max_width}")
    return cu_words


def span_pool(start: Tensor, end: Tensor, cu_words: Tensor, max_width: int) -> Tensor:
    """``relu(start_i + end_j)`` of every span i..j of at most ``max_width`` words.

    Args:
        start, end: (words, R), one dtype: float32, bfloat16 or float16.
        cu_words: (num_seqs + 1,) int32, 0 to words.
        max_width: words in the longest span, at least 1.

    Returns:
        (words, max_width, R), dtype of ``start``; the autocast dtype under autocast. Row
        ``[i, w]`` is the span from word i to word i + w; zeros past the end of the sequence.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or cu_words do not fit.
    """
    cu_words = check_spans(start, end, cu_words, max_width)
    return select("span_pool", start)(start, end, cu_words, max_width)
