"""Span scores: ``relu(start_i + end_{i + w}) . labels_c``, the span rows never in memory.

Forward: a program owns BLOCK_M spans of one sequence and BLOCK_C of its labels, makes the rows of
the spans BLOCK_R columns at a time and multiplies them by the labels at once; a long label axis is
cut among programs that stand side by side, so start and end rows come from L2 once. FLOPs:
2 R C a span (matrix units); bytes: 4 R a word for start and end, 2 C a span for the logits.
Backward: see span_score_bwd.

Ladder (compiled for sm_90, bf16; has not run on a GPU, so no time is claimed):
    v1  rows from registers into wgmma, no spill: registers in docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastenc.triton_kernels import _common
from fastenc.triton_kernels._common import cast, precision, wide
from fastenc.triton_kernels._spans import (
    Launch,
    locate_spans,
    score_launches,
    span_slots,
    strides_of,
    tile_logits,
    tile_spans,
)
from fastenc.triton_kernels.span_score_bwd import backward


@triton.jit(do_not_specialize=["num_seqs", "threshold"])
def score_forward_kernel(
    start_ptr, end_ptr, labels_ptr, bias_ptr, cu_ptr, seed_ptr, out_ptr, num_seqs, max_width,
    size, num_labels, threshold, keep_scale, start_stride, end_stride, label_stride_n,
    label_stride_c, bias_stride_n, bias_stride_c, DROPOUT: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_labels, BLOCK_C)
    slot = tl.program_id(0) // blocks
    start, length, first, seq = locate_spans(slot, cu_ptr, num_seqs, max_width, BLOCK_M)
    if first >= length * max_width:
        return
    span, head, width, tail, inside, exists = tile_spans(first, length, max_width, BLOCK_M)
    label = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = wide(start)
    if BIAS:
        bias_ptr += wide(seq) * bias_stride_n
    logits = tile_logits(
        start_ptr + begin * start_stride, end_ptr + begin * end_stride,
        labels_ptr + wide(seq) * label_stride_n, bias_ptr, seed_ptr, threshold, keep_scale,
        start, head, width, tail, label, num_labels, size, start_stride, end_stride,
        label_stride_c, bias_stride_c, DROPOUT, BIAS, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    logits = tl.where(exists[:, None], logits, float("-inf"))
    place = (begin * max_width + span) * num_labels
    stored = inside[:, None] & (label < num_labels)[None, :]
    out = cast(logits, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] + label[None, :], out, mask=stored)


def span_score_fwd(
    start: Tensor, end: Tensor, labels: Tensor, cu_words: Tensor, max_width: int,
    label_bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    words, size = start.shape
    num_seqs, num_labels, _ = labels.shape
    out = _common.empty((words, max_width, num_labels), start.dtype, start.device)
    if out.numel() == 0:
        return out
    start, end, labels, cu = (_common.unit_rows(x) for x in (start, end, labels, cu_words))
    chip = _common.chip_of(start.device)

    def run(launch: Launch) -> None:
        tiles = span_slots(words, num_seqs, max_width, launch.block_m)
        grid = (tiles * triton.cdiv(num_labels, launch.block_c),)
        _common.launch(
            score_forward_kernel, grid, start, end, labels, label_bias, cu, seed, out, num_seqs,
            max_width, size, num_labels, int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p),
            start.stride(0), end.stride(0), *labels.stride()[:2], *strides_of(label_bias, 2),
            DROPOUT=dropout_p > 0, BIAS=label_bias is not None, PRECISION=precision(start.dtype),
            **launch.constants(),
        )  # fmt: skip

    choices = score_launches(num_labels, start.dtype, chip)
    key = ("span_score_fwd", size, choices[0].block_c, start.dtype, dropout_p > 0, chip.name)
    _common.run_chosen(key, start.device, choices, run)
    return out


def span_score_bwd(
    grad: Tensor, start: Tensor, end: Tensor, labels: Tensor, cu_words: Tensor, max_width: int,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, start, end, labels, cu_words, max_width, dropout_p, seed)
