"""Span candidates: count, prefix sum, write; the scores are never in memory.

One kernel runs twice, compiled once, so both runs make the same bits: first it counts what passes
the threshold for each span, then it writes what passes at the places that the prefix sum of the
counts gives, which is the order of (word, width, label). The second run leaves tiles without
candidates at once. The number of candidates comes back to the host, one synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import precision, wide
from fastenc.triton_kernels._spans import (
    candidate_launch,
    locate_spans,
    span_slots,
    strides_of,
    tile_logits,
    tile_spans,
)


@triton.jit(do_not_specialize=["num_seqs", "writing", "max_width"])
def candidates_kernel(
    start_ptr, end_ptr, labels_ptr, bias_ptr, cu_ptr, count_ptr, place_ptr, word_ptr, width_ptr,
    label_ptr, score_ptr, writing, num_seqs, max_width, size, num_labels, least, start_stride,
    end_stride, label_stride_n, label_stride_c, bias_stride_n, bias_stride_c, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    start, length, first, seq = locate_spans(tl.program_id(0), cu_ptr, num_seqs, max_width, BLOCK_M)
    if first >= length * max_width:
        return
    span, head, width, tail, inside, exists = tile_spans(first, length, max_width, BLOCK_M)
    begin = wide(start)
    spans = begin * max_width + span
    place = tl.zeros((BLOCK_M,), tl.int64)
    if writing != 0:
        if tl.sum(tl.load(count_ptr + spans, mask=inside, other=0)) == 0:
            return
        place = tl.load(place_ptr + spans, mask=inside, other=0)
    start_ptr += begin * start_stride
    end_ptr += begin * end_stride
    labels_ptr += wide(seq) * label_stride_n
    if BIAS:
        bias_ptr += wide(seq) * bias_stride_n
    found = tl.zeros((BLOCK_M,), tl.int32)
    for base in range(0, num_labels, BLOCK_C):
        label = base + tl.arange(0, BLOCK_C)
        logits = tile_logits(
            start_ptr, end_ptr, labels_ptr, bias_ptr, None, 0, 1.0, start, head, width, tail, label,
            num_labels, size, start_stride, end_stride, label_stride_c, bias_stride_c, False, BIAS,
            PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        score = 1.0 / (1.0 + tl.exp(-logits))
        passes = (score > least) & exists[:, None] & (label < num_labels)[None, :]
        ones = passes.to(tl.int32)
        if writing != 0:
            before = tl.cumsum(ones, axis=1) - ones
            at = (place + found)[:, None] + before
            zero = tl.zeros((BLOCK_M, BLOCK_C), tl.int64)
            tl.store(word_ptr + at, (begin + head)[:, None] + zero, mask=passes)
            tl.store(width_ptr + at, width[:, None] + zero, mask=passes)
            tl.store(label_ptr + at, label[None, :] + zero, mask=passes)
            tl.store(score_ptr + at, score, mask=passes)
        found += tl.sum(ones, axis=1)
    if writing == 0:
        tl.store(count_ptr + spans, found, mask=inside)


def span_candidates_fwd(
    start: Tensor, end: Tensor, labels: Tensor, cu_words: Tensor, max_width: int, threshold: float,
    label_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    words, size = start.shape
    num_seqs, num_labels, _ = labels.shape
    device = start.device

    def lists(count: int) -> tuple[Tensor, ...]:
        integers = (_common.empty((count,), torch.int64, device) for _ in range(3))
        return *integers, _common.empty((count,), torch.float32, device)

    if words * num_labels == 0:
        return lists(0)
    max_width = min(max_width, words)  # as wide as the batch: it must not specialise the kernel
    start, end, labels, cu = (_common.unit_rows(x) for x in (start, end, labels, cu_words))
    launch = candidate_launch(num_labels, start.dtype, _common.chip_of(device))
    counts = _common.empty((words * max_width,), torch.int32, device)
    places = _common.empty((words * max_width,), torch.int64, device)

    def run(found: tuple[Tensor, ...], writing: int) -> None:
        _common.launch(
            candidates_kernel, (span_slots(words, num_seqs, max_width, launch.block_m),), start,
            end, labels, label_bias, cu, counts, places, *found, writing, num_seqs, max_width, size,
            num_labels, threshold, start.stride(0), end.stride(0), *labels.stride()[:2],
            *strides_of(label_bias, 2), BIAS=label_bias is not None,
            PRECISION=precision(start.dtype), **launch.constants(),
        )  # fmt: skip

    run(lists(1), 0)
    torch.cumsum(counts, 0, dtype=torch.int64, out=places)
    total = int(places[-1])
    found = lists(total)
    if total:
        places -= counts
        run(found, 1)
    return found
