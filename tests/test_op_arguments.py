"""Arbitrary arguments: an op answers rightly or says clearly what is wrong, and never crashes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastenc
from fastenc import testing

pytestmark = pytest.mark.usefixtures("two_threads")

quick = settings(deadline=None, max_examples=60)
lengths_of = st.lists(st.integers(0, 20), min_size=0, max_size=6)
dtypes = st.sampled_from(testing.DTYPES)


@quick
@given(edges=st.lists(st.integers(-3, 12), min_size=0, max_size=5), max_seqlen=st.integers(-1, 12))
def test_cu_seqlens_are_right_or_refused(edges, max_seqlen):
    total, cu = 8, torch.tensor(edges, dtype=torch.int32)
    x = torch.randn(total, 3, 2, 4)
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    valid = bool(edges) and edges[0] == 0 and edges[-1] == total and min(lengths, default=0) >= 0
    fits = valid and max(lengths, default=0) <= max_seqlen
    calls = {
        "segment_pool": (valid, lambda: fastenc.segment_pool(x[:, 0, 0], cu)),
        "varlen_attention": (fits, lambda: fastenc.varlen_attention(*x.unbind(1), cu, max_seqlen)),
        "rope_varlen_attention": (
            fits,
            lambda: fastenc.rope_varlen_attention(x, *testing.rope_tables(16, 4), cu, max_seqlen),
        ),
    }
    for name, (good, call) in calls.items():
        if good:
            assert call().isfinite().all(), name
        else:
            with pytest.raises(ValueError, match=r"cu_seqlens|max_seqlen"):
                call()


def test_cu_seqlens_of_any_stride():
    strided = torch.tensor([0, -1, 3, -1, 8], dtype=torch.int32)[::2]
    x, labels, row = torch.randn(8, 3, 2, 4), torch.randn(2, 5, 4), torch.randn(8, 4)
    heads, weight = x.unbind(1), torch.randn(4, 4)
    calls = {
        "segment_pool": lambda cu: fastenc.segment_pool(row, cu),
        "varlen_attention": lambda cu: fastenc.varlen_attention(*heads, cu, 5),
        "rope_varlen_attention": lambda cu: fastenc.rope_varlen_attention(
            x, *testing.rope_tables(16, 4), cu, 5
        ),
        "disentangled_attention": lambda cu: fastenc.disentangled_attention(
            *heads, None, None, cu, 5
        ),
        "span_pool": lambda cu: fastenc.span_pool(row, row, cu, 2),
        "span_score": lambda cu: fastenc.span_score(row, row, labels, cu, 2),
        "span_candidates": lambda cu: fastenc.span_candidates(row, row, labels, cu, 2, 0.5)[3],
        "token_score": lambda cu: fastenc.token_score(
            row, labels, row, labels, weight, weight[:3], cu
        ),
        "VarlenBatch": lambda cu: fastenc.segment_pool(
            row, fastenc.nn.VarlenBatch.from_cu_seqlens(cu).cu_seqlens
        ),
    }
    for name, call in calls.items():
        assert torch.equal(call(strided), call(strided.clone())), name


@quick
@given(edges=st.lists(st.integers(-3, 12), min_size=0, max_size=5))
def test_raw_kernels_check_cu_seqlens_themselves(edges):
    total, cu = 8, torch.tensor(edges, dtype=torch.int32)
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    valid = bool(edges) and edges[0] == 0 and edges[-1] == total and min(lengths, default=0) >= 0
    q = torch.randn(total, 2, 4)
    calls = (
        lambda: torch.ops.fastenc.segment_pool_fwd(q[:, 0], cu, "mean"),
        lambda: torch.ops.fastenc.varlen_attention_fwd(
            q, q, q, cu, 12, -1, -1, 0.5, 0.0, None, None
        ),
    )
    for call in calls:
        if valid:
            call()
        else:
            with pytest.raises(RuntimeError):
                call()


@quick
@given(
    lengths=lengths_of,
    heads=st.integers(1, 3),
    half=st.integers(1, 20),
    window=st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    dtype=dtypes,
)
def test_rope_attention_on_any_batch(lengths, heads, half, window, dtype):
    case = testing.Case(
        "rope_varlen_attention",
        "drawn",
        testing._rope_attention(tuple(lengths), heads, 2 * half, window),
    )
    testing.check_case(fastenc.rope_varlen_attention, testing.reference_of(case.op), case, dtype)


@quick
@given(lengths=lengths_of, hidden=st.integers(1, 40), mode=st.sampled_from(("mean", "max")))
def test_segment_pool_on_any_batch(lengths, hidden, mode):
    case = testing.Case(
        "segment_pool", "drawn", testing._segment_pool(tuple(lengths), hidden, mode)
    )
    testing.check_case(fastenc.segment_pool, testing.reference_of(case.op), case, torch.float32)


@quick
@given(
    total=st.integers(0, 9), n=st.integers(1, 3), heads=st.integers(1, 3), half=st.integers(1, 40),
    strided=st.booleans(), dtype=dtypes,
)  # fmt: skip
def test_rope_on_any_shape(total, n, heads, half, strided, dtype):
    case = testing.Case("rope", "drawn", testing._rope(total, n, heads, 2 * half, 12, strided))
    testing.check_case(fastenc.rope, testing.reference_of("rope"), case, dtype)


@quick
@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=3), hidden=st.integers(2, 90),
    residual=st.booleans(), bias=st.booleans(), dtype=dtypes,
)  # fmt: skip
def test_add_layer_norm_on_any_shape(shape, hidden, residual, bias, dtype):
    make = testing._add_layer_norm((*shape, hidden), residual, bias)
    case = testing.Case("add_layer_norm", "drawn", make)
    testing.check_case(fastenc.add_layer_norm, testing.reference_of("add_layer_norm"), case, dtype)
