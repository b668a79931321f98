"""The attention ops refuse what does not fit, in Python with words and in C++ for memory's sake."""

from __future__ import annotations

import op_tests
import pytest
import torch

import fastenc
from fastenc import testing

pytestmark = pytest.mark.usefixtures("two_threads")


def _packed(lengths, heads=2, head_dim=32):
    qkv = torch.randn(sum(lengths), 3, heads, head_dim)
    return qkv, testing.cu_seqlens_of(lengths), max(lengths)


def _raw(lengths=(5, 4), head_dim=8):
    qkv, cu_seqlens, longest = _packed(lengths, head_dim=head_dim)
    q, k, v = qkv.unbind(1)
    return [q, k, v, cu_seqlens, longest, 2, 2, 0.3, 0.0, None, None]


def _rope_raw(lengths=(5, 4), head_dim=8):
    qkv, cu_seqlens, longest = _packed(lengths, head_dim=head_dim)
    cos, sin = testing.rope_tables(longest, head_dim)
    return [qkv, cos, sin, cu_seqlens, longest, 2, 2, 0.3, 0.0, None]


def test_opcheck():
    args = _raw()
    for x in args[:3]:
        x.requires_grad_()
    op_tests.check_opcheck(next(testing.cases("varlen_attention")), tuple(args))
    args = _rope_raw()
    args[0].requires_grad_()
    op_tests.check_opcheck(next(testing.cases("rope_varlen_attention")), tuple(args))


def _unsafe():
    def changed(make, index, value):
        args = make()
        args[index] = value(args[index]) if callable(value) else value
        return args

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32)

    yield "past the end", "varlen_attention", changed(_raw, 3, int32(0, 5, 10)), "cu_seqlens"
    yield "decreasing", "varlen_attention", changed(_raw, 3, int32(0, 12, 5, 9)), "cu_seqlens"
    yield "negative", "varlen_attention", changed(_raw, 3, int32(-1, 9)), "cu_seqlens"
    yield "no entry", "varlen_attention", changed(_raw, 3, int32()), "cu_seqlens"
    yield "int64", "varlen_attention", changed(_raw, 3, lambda x: x.long()), "int32"
    yield "longer than max", "varlen_attention", changed(_raw, 4, 4), "max_seqlen"
    yield "k shorter", "varlen_attention", changed(_raw, 1, lambda x: x[1:]), "k: expected size 9"
    yield "v narrower", "varlen_attention", changed(_raw, 2, lambda x: x[..., 1:]), "v: expected"
    yield "float64", "varlen_attention", changed(_raw, 0, lambda x: x.double()), "float32"
    yield "head_dim 257", "varlen_attention", _raw(head_dim=257), "head_dim"
    yield "even table", "varlen_attention", changed(_raw, 10, torch.zeros(2, 4)), "rel_bias"
    yield "dropout, no seed", "varlen_attention", changed(_raw, 8, 0.5), "seed"
    yield "short cos", "rope_varlen_attention", changed(_rope_raw, 1, lambda x: x[1:]), "cos"
    yield "narrow sin", "rope_varlen_attention", changed(_rope_raw, 2, lambda x: x[:, 1:]), "sin"


@pytest.mark.parametrize(("name", "op", "args", "words"), _unsafe(), ids=lambda v: str(v)[:20])
def test_raw_op_is_memory_safe(name, op, args, words):
    with pytest.raises(RuntimeError, match=words):
        getattr(torch.ops.fastenc_cpu, f"{op}_fwd")(*args)


def _misuse():
    qkv, cu_seqlens, longest = _packed((5, 4))
    q, k, v = qkv.unbind(1)
    good = q, k, v, cu_seqlens, longest
    yield "shapes differ", (q, k[..., 1:], v, cu_seqlens, longest), {}, ValueError, "shape of q"
    yield "dtypes differ", (q, k.half(), v, cu_seqlens, longest), {}, (TypeError, ValueError), "k"
    yield "window", good, {"window_size": (-2, 0)}, ValueError, "window_size"
    yield "one window", good, {"window_size": 3}, TypeError, "window_size"
    yield "dropout of 1", good, {"dropout_p": 1.0}, ValueError, "dropout_p"
    yield "dropout of nan", good, {"dropout_p": float("nan")}, ValueError, "dropout_p"
    yield "longest too small", (q, k, v, cu_seqlens, 4), {}, ValueError, "max_seqlen"
    yield "odd buckets", good, {"rel_bias": torch.zeros(2, 31)}, ValueError, "rel_bias"
    few, whole = torch.zeros(1, 32), torch.zeros(2, 32, dtype=torch.int64)
    yield "too few heads", good, {"rel_bias": few}, ValueError, r"rel_bias: .* \(heads = 2"
    yield "integer bias", good, {"rel_bias": whole}, TypeError, "rel_bias: .*int64"
    elsewhere = torch.zeros(2, 32).to("meta")
    yield "bias elsewhere", good, {"rel_bias": elsewhere}, ValueError, "rel_bias: .* device of q"
    yield "keys elsewhere", (q, k.to("meta"), v, *good[3:]), {}, ValueError, "k: .* device of q"
    yield (
        "no head_dim",
        tuple(x[..., :0] for x in good[:3]) + good[3:],
        {},
        ValueError,
        "head_dim >= 1",
    )
    yield "integers", (q.int(), *good[1:]), {}, TypeError, "q: expected a floating"
    yield "float longest", (*good[:4], 9.0), {}, TypeError, "max_seqlen: expected an int"
    yield "true longest", (*good[:4], True), {}, TypeError, "max_seqlen: expected an int"
    yield (
        "text as a seed",
        good,
        {"dropout_p": 0.1, "seed": "7"},
        TypeError,
        "seed: expected an int",
    )
    two = torch.zeros(2, dtype=torch.int64)
    yield "two seeds", good, {"dropout_p": 0.1, "seed": two}, ValueError, "seed: expected one int64"
    real = torch.zeros(1)
    yield (
        "real seed",
        good,
        {"dropout_p": 0.1, "seed": real},
        ValueError,
        "seed: expected one int64",
    )
    there = two[:1].to("meta")
    yield "seed elsewhere", good, {"dropout_p": 0.1, "seed": there}, ValueError, "seed: .* on meta"


@pytest.mark.parametrize(
    ("name", "args", "options", "error", "words"), _misuse(), ids=lambda v: str(v)[:20]
)
def test_misuse(name, args, options, error, words):
    with pytest.raises(error, match=words):
        fastenc.varlen_attention(*args, **options)


def _rope_misuse():
    qkv, cu_seqlens, longest = _packed((5, 4))
    cos, sin = testing.rope_tables(longest, 32)
    rest = cos, sin, cu_seqlens, longest
    yield "two of q, k, v", (qkv[:, :2], *rest), {}, ValueError, "qkv: expected"
    yield "odd head_dim", (qkv[..., 1:], *rest), {}, ValueError, "even head_dim"
    yield "no head_dim", (qkv[..., :0], *rest), {}, ValueError, "even head_dim"
    yield "three dimensions", (qkv[:, 0], *rest), {}, ValueError, "qkv: expected 4 dim"
    yield "integers", (qkv.int(), *rest), {}, TypeError, "qkv: expected a floating"
    yield (
        "short tables",
        (qkv, cos[1:], sin[1:], *rest[2:]),
        {},
        ValueError,
        "cos: expected at least",
    )
    yield "narrow tables", (qkv, cos[:, 1:], sin, *rest[2:]), {}, ValueError, "for head_dim 32"
    yield "longest too small", (qkv, *rest[:3], 4), {}, ValueError, "max_seqlen"
    yield "window", (qkv, *rest), {"window_size": (0, -2)}, ValueError, "window_size"
    yield "dropout of 1", (qkv, *rest), {"dropout_p": 1.0}, ValueError, "dropout_p"


@pytest.mark.parametrize(
    ("name", "args", "options", "error", "words"), _rope_misuse(), ids=lambda v: str(v)[:20]
)
def test_rope_misuse(name, args, options, error, words):
    with pytest.raises(error, match=words):
        fastenc.rope_varlen_attention(*args, **options)


def test_autocast_takes_the_tables_along():
    """All of them 16-bit: what the Hopper kernels serve, and what flash-attn's rotary does."""
    qkv, (cos, sin) = torch.randn(9, 3, 2, 8), testing.rope_tables(9, 8)
    cu = testing.cu_seqlens_of((4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastenc.rope_varlen_attention(qkv, cos, sin, cu, 5)
    low = (x.bfloat16() for x in (qkv, cos, sin))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fastenc.rope_varlen_attention(*low, cu, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_have_the_dtype_that_the_fake_says(dtype):
    for op, args in (("varlen_attention", _raw()), ("rope_varlen_attention", _rope_raw())):
        forward = getattr(torch.ops.fastenc_reference, f"{op}_fwd")
        tensors = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                   for x in args]  # fmt: skip
        without = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in tensors]
        for found, said in zip(forward(*tensors), forward(*without), strict=True):
            assert found.dtype == said.dtype and found.shape == said.shape, op


def test_autocast_makes_dtypes_one():
    """As torch's scaled_dot_product_attention; without autocast they have to be one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 2, 8, generator=g).bfloat16() for _ in range(3))
    table = torch.randn(2, 512, 8, generator=g).bfloat16()
    labels = torch.randn(2, 3, 8, generator=g).bfloat16()
    edges = torch.tensor([0, 3, 7], dtype=torch.int32)
    calls = {
        "attention": lambda q: fastenc.varlen_attention(q, k, v, edges, 4),
        "flash": lambda q: fastenc.flash_attn_varlen_func(q, k, v, edges, edges, 4, 4),
        "disentangled": lambda q: fastenc.disentangled_attention(q, k, v, table, None, edges, 4),
        "span_pool": lambda q: fastenc.span_pool(q[:, 0], k[:, 0], edges, 3),
        "span_score": lambda q: fastenc.span_score(q[:, 0], k[:, 0], labels, edges, 3),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match="expected the dtype of"):
            call(q.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(q.float()), call(q))
            with pytest.raises(TypeError, match="expected the dtype of"):
                call(q.double())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="dtype of cos"):
        fastenc.rope(q, torch.ones(9, 4), torch.ones(9, 4).bfloat16(), torch.arange(7))
