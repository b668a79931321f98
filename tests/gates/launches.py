"""The calls whose kernels are compiled: a few of each kind by default, the grid on request."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastenc.triton_kernels import (
    _common,
    add_layer_norm,
    disentangled_attention,
    geglu,
    rope,
    rope_varlen_attention,
    segment_pool,
    span_candidates,
    span_pool,
    span_score,
    token_score,
    varlen_attention,
)

HEADS = 12
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Call = Callable[[], object]


@dataclass(frozen=True)
class Batch:
    """What changes from call to call, and no kernel may be compiled for."""

    tokens: int = 64
    num_seqs: int = 8
    longest: int = 64

    @property
    def cu(self) -> torch.Tensor:
        return torch.zeros(self.num_seqs + 1, dtype=torch.int32)


BATCH = Batch()


def call_geglu(
    intermediate: int, dtype: torch.dtype, activation: str = "gelu", batch: Batch = BATCH
) -> None:
    x = torch.empty(batch.tokens, 2 * intermediate, dtype=dtype)
    geglu.geglu_bwd(geglu.geglu_fwd(x, activation), x, activation)


def call_rope(heads: int, head_dim: int, dtype: torch.dtype, batch: Batch = BATCH) -> None:
    x = torch.empty(batch.tokens, 3, heads, head_dim, dtype=dtype)[:, :2]
    table = torch.empty(64, head_dim // 2, dtype=dtype)
    positions = torch.zeros(batch.tokens, dtype=torch.int64)
    rope.rope_bwd(rope.rope_fwd(x, table, table, positions), table, table, positions)


def call_add_layer_norm(
    hidden: int, dtype: torch.dtype, residual: bool, bias: bool, batch: Batch = BATCH
) -> None:
    x, weight = torch.empty(batch.tokens, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
    more = x if residual else None
    outputs = add_layer_norm.add_layer_norm_fwd(x, more, weight, weight if bias else None, 1e-5)
    add_layer_norm.add_layer_norm_bwd(x, more, x, weight, *outputs[2:], bias)


def call_segment_pool(hidden: int, dtype: torch.dtype, mode: str, batch: Batch = BATCH) -> None:
    x = torch.empty(batch.tokens, hidden, dtype=dtype)
    out, index = segment_pool.segment_pool_fwd(x, batch.cu, mode)
    segment_pool.segment_pool_bwd(out, index, batch.cu, batch.tokens, mode)


def _spans(size: int, labels: int, dtype: torch.dtype, batch: Batch) -> tuple[torch.Tensor, ...]:
    """start, end, labels of the sequences."""
    words = torch.empty(batch.tokens, size, dtype=dtype)
    return words, words, torch.empty(batch.num_seqs, labels, size, dtype=dtype)


def call_span_pool(size: int, dtype: torch.dtype, batch: Batch = BATCH) -> None:
    start, end, _ = _spans(size, 1, dtype, batch)
    out = span_pool.span_pool_fwd(start, end, batch.cu, 12)
    span_pool.span_pool_bwd(out, start, end, batch.cu, 12)


def call_span_score(
    size: int, labels: int, dtype: torch.dtype, dropout: bool = False, batch: Batch = BATCH
) -> None:
    tensors = _spans(size, labels, dtype, batch)
    bias = torch.empty(batch.num_seqs, labels, dtype=dtype)
    options = (0.4, torch.zeros(1, dtype=torch.int64)) if dropout else (0.0, None)
    out = span_score.span_score_fwd(*tensors, batch.cu, 12, bias, *options)
    span_score.span_score_bwd(out, *tensors, batch.cu, 12, *options)


def call_token_score(
    size: int, factors: int, labels: int, dtype: torch.dtype, dropout: bool = False,
    batch: Batch = BATCH,
) -> None:  # fmt: skip
    token, s = (torch.empty(batch.tokens, n, dtype=dtype) for n in (size, factors))
    label, t = (torch.empty(batch.num_seqs, labels, n, dtype=dtype) for n in (size, factors))
    weight, outs = torch.empty(size, factors, dtype=dtype), torch.empty(3, size, dtype=dtype)
    options = (0.3, torch.zeros(1, dtype=torch.int64)) if dropout else (0.0, None)
    tensors = token, label, s, t, weight, outs, batch.cu
    out = token_score.token_score_fwd(*tensors, torch.empty(3, dtype=dtype), *options)
    token_score.token_score_bwd(out, *tensors, *options)


def call_span_candidates(size: int, labels: int, dtype: torch.dtype, batch: Batch = BATCH) -> None:
    """Nothing is found where nothing runs: counts are zeros, so the list is empty."""
    empty = _common.empty
    _common.empty = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)
    try:
        tensors = _spans(size, labels, dtype, batch)
        span_candidates.span_candidates_fwd(*tensors, batch.cu, 12, 0.5, None)
    finally:
        _common.empty = empty


def call_attention(
    head_dim: int, dtype: torch.dtype, window: tuple[int, int], dropout: bool = False,
    bias: bool = False, rope: bool = False, grad_lse: bool = False, batch: Batch = BATCH,
) -> None:  # fmt: skip
    qkv = torch.empty(batch.tokens, 3, HEADS, head_dim, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    shape = (batch.cu, batch.longest, *window, head_dim**-0.5, 0.1 if dropout else 0.0, seed)
    dlse = torch.empty(HEADS, batch.tokens) if grad_lse else None
    if rope:
        tables = (torch.empty(64, head_dim // 2, dtype=dtype),) * 2
        out, lse = rope_varlen_attention.rope_varlen_attention_fwd(qkv, *tables, *shape)
        rope_varlen_attention.rope_varlen_attention_bwd(
            out, dlse, qkv, *tables, out, lse, *shape
        )  # fmt: skip
        return
    table = torch.empty(HEADS, 257, dtype=dtype) if bias else None
    q, k, v = qkv.unbind(1)
    out, lse = varlen_attention.varlen_attention_fwd(q, k, v, *shape, table)
    varlen_attention.varlen_attention_bwd(out, dlse, q, k, v, out, lse, *shape, table)


def call_disentangled(
    head_dim: int, dtype: torch.dtype, terms: tuple[bool, bool] = (True, True),
    dropout: bool = False, batch: Batch = BATCH,
) -> None:  # fmt: skip
    q, k, v = torch.empty(batch.tokens, 3, HEADS, head_dim, dtype=dtype).unbind(1)
    tables = (torch.empty(HEADS, 512, head_dim, dtype=dtype) if term else None for term in terms)
    tensors = (q, k, v, *tables)
    index = torch.zeros(1025, dtype=torch.int32)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    shape = index, batch.cu, batch.longest, 0.1, 0.1 if dropout else 0.0, seed
    out, lse = disentangled_attention.disentangled_attention_fwd(*tensors, *shape)
    disentangled_attention.disentangled_attention_bwd(out, *tensors, out, lse, *shape)


def name_of(call: functools.partial) -> str:
    words = [call.func.__name__.removeprefix("call_")]
    words += [str(a).removeprefix("torch.").replace(" ", "") for a in call.args]
    return "-".join([*words, *(k for k, v in call.keywords.items() if v)])


def aligned(call: functools.partial) -> bool:
    """Whether rows, and heads in them, begin at multiples of 16 elements. Triton knows no smaller
    divisor of a stride, so that nothing else may be read 16 bytes at a time."""
    return call.args[1 if call.func is call_rope else 0] % 16 == 0


GLOBAL, LOCAL, WIDE = (-1, -1), (64, 64), (512, 0)


def default_calls() -> dict[str, list[Call]]:
    """What ModernBERT, BERT and MPNet launch, by op."""
    bind = functools.partial
    return {
        "geglu": [bind(call_geglu, 1152, BF16), bind(call_geglu, 1152, FP32)],
        "rope": [bind(call_rope, 12, 64, BF16)],
        "add_layer_norm": [
            bind(call_add_layer_norm, 768, BF16, True, False),
            bind(call_add_layer_norm, 768, FP32, True, True),
        ],
        "segment_pool": [bind(call_segment_pool, 768, BF16, "mean")],
        "varlen_attention": [
            bind(call_attention, 64, BF16, GLOBAL),
            bind(call_attention, 64, BF16, LOCAL),
            bind(call_attention, 64, BF16, GLOBAL, dropout=True),
        ],
        "rope_varlen_attention": [
            bind(call_attention, 64, BF16, GLOBAL, rope=True),
            bind(call_attention, 64, BF16, LOCAL, rope=True),
        ],
        "span_pool": [bind(call_span_pool, 2048, BF16)],
        "span_score": [
            bind(call_span_score, 2048, 10, BF16),
            bind(call_span_score, 2048, 1000, BF16),
        ],
        "token_score": [bind(call_token_score, 2048, 512, 25, BF16)],
        "span_candidates": [bind(call_span_candidates, 2048, 10, BF16)],
        "disentangled_attention": [bind(call_disentangled, 64, BF16)],
    }


def all_calls() -> list[Call]:
    """Calls that between them reach every launch the choosers return, by one aspect at a time."""
    bind = functools.partial
    calls: list[Call] = []
    for intermediate, dtype in itertools.product((1152, 3072, 1100), (BF16, FP32)):
        calls.append(bind(call_geglu, intermediate, dtype))
    calls += [bind(call_geglu, 1152, BF16, activation) for activation in ("gelu_tanh", "silu")]
    calls.append(bind(call_geglu, 1536, BF16))
    for heads, head_dim in ((12, 64), (12, 32), (8, 96), (8, 128)):
        calls += [bind(call_rope, heads, head_dim, dtype) for dtype in (BF16, FP32)]
    hiddens = (256, 384, 768, 1000, 1024, 2048, 3000, 4096, 5000, 16384)
    for hidden, dtype in itertools.product(hiddens, (BF16, FP32)):
        calls.append(bind(call_add_layer_norm, hidden, dtype, True, hidden > 2048))
    calls += [bind(call_add_layer_norm, n, BF16, False, n == 768) for n in (768, 16384)]
    for head_dim, dtype, dropout in itertools.product(
        (32, 64, 96, 128), (BF16, FP32), (False, True)
    ):
        calls.append(bind(call_disentangled, head_dim, dtype, dropout=dropout))
    for terms in ((True, False), (False, True), (False, False)):
        calls.append(bind(call_disentangled, 64, BF16, terms))
    calls.append(bind(call_disentangled, 128, BF16, (False, False), dropout=True))
    calls.append(bind(call_disentangled, 64, FP16))
    for (size, factors), labels, dtype, dropout in itertools.product(
        ((2048, 512), (3072, 768)), (1, 25), (BF16, FP32), (False, True)
    ):
        calls.append(bind(call_token_score, size, factors, labels, dtype, dropout))
    calls.append(bind(call_token_score, 2048, 512, 25, FP16, True))
    for size, dtype in itertools.product((2048, 3072), (BF16, FP32)):
        calls.append(bind(call_span_pool, size, dtype))
    for labels, dropout in itertools.product((1, 10, 25, 60, 1000), (False, True)):
        calls += [bind(call_span_score, 2048, labels, d, dropout=dropout) for d in (BF16, FP32)]
    calls += [bind(call_span_score, 3072, 25, FP16, dropout=True)]
    for labels, dtype in itertools.product((10, 1000), (BF16, FP32)):
        calls.append(bind(call_span_candidates, 2048, labels, dtype))
    for dtype, mode in itertools.product((BF16, FP32), ("mean", "cls", "max", "last")):
        calls.append(bind(call_segment_pool, 768, dtype, mode))
    for head_dim in (32, 64, 96, 128):
        for window in (GLOBAL, LOCAL):
            for turned, dropout in itertools.product((False, True), repeat=2):
                calls.append(
                    bind(call_attention, head_dim, BF16, window, rope=turned, dropout=dropout)
                )
        for dropout in (False, True):
            calls.append(bind(call_attention, head_dim, BF16, GLOBAL, bias=True, dropout=dropout))
    for head_dim in (8, 80, 256):
        calls += [bind(call_attention, head_dim, BF16, window) for window in (GLOBAL, LOCAL)]
    for head_dim, turned in itertools.product((64, 128), (False, True)):
        calls.append(bind(call_attention, head_dim, FP32, LOCAL, rope=turned))
    for window in (WIDE, (128, 128), (8, 8)):
        calls += [bind(call_attention, 64, BF16, window, rope=turned) for turned in (False, True)]
    calls += [bind(call_attention, 64, FP16, window, rope=True) for window in (GLOBAL, LOCAL)]
    for window in (GLOBAL, LOCAL):
        calls.append(bind(call_attention, 256, BF16, window, rope=True, dropout=True))
        calls.append(bind(call_attention, 128, FP32, window, rope=True, dropout=True))
    for head_dim, dtype in itertools.product((128, 256), (BF16, FP32)):
        calls.append(bind(call_attention, head_dim, dtype, GLOBAL, bias=True, dropout=True))
    calls.append(bind(call_attention, 64, BF16, GLOBAL, grad_lse=True))
    calls.append(bind(call_attention, 64, BF16, LOCAL, bias=True, dropout=True))
    calls += [bind(call_attention, 64, FP32, GLOBAL, bias=True, dropout=d) for d in (False, True)]
    return calls
