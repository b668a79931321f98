import op_tests
import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops._disentangled_ref import relative_index
from fastenc.ops.disentangled_attention import _index_for

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("disentangled_attention")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def _inputs(lengths, heads=2, head_dim=8, buckets=4, dtype=torch.float32, grad=False):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    q, k, v = (leaf(sum(lengths), heads, head_dim) for _ in range(3))
    tables = [leaf(heads, 2 * buckets, head_dim) for _ in range(2)]
    return q, k, v, *tables, testing.cu_seqlens_of(lengths), max([*lengths, 1])


@pytest.mark.parametrize("terms", ["both", "c2p", "p2c", "none"])
def test_opcheck(terms):
    q, k, v, key, query, cu, longest = _inputs((3, 0, 6), grad=True)
    key = key if terms in ("both", "c2p") else None
    query = query if terms in ("both", "p2c") else None
    dropout = (0.25, torch.tensor([7])) if terms == "both" else (0.0, None)
    args = (q, k, v, key, query, relative_index(4, 6), cu, longest, 0.3, *dropout)
    op_tests.check_opcheck(next(testing.cases("disentangled_attention")), args)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    for case in list(testing.cases("disentangled_attention"))[::2]:
        op_tests.check_repeatable(case, torch.float32, threads)


def test_the_number_of_threads_changes_no_bit():
    args = _inputs((130, 7, 0, 61, 300, 40), grad=True)
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        options = {"buckets": 4, "max_positions": 6, "dropout_p": 0.1, "seed": 3}
        run = testing.run_with_gradients(fastenc.disentangled_attention, args, options)
        results.append((run[0][0], *(g for g in run[1].values() if g is not None)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_compiles():
    def make(n):
        return _inputs((n, n), grad=True)

    op_tests.check_compiles(lambda *args: fastenc.disentangled_attention(*args, 4, 6), make)


def test_gradcheck():
    *tensors, cu, longest = _inputs((2, 0, 5), dtype=torch.float64, head_dim=3, grad=True)

    def attend(*tensors):
        return fastenc.disentangled_attention(*tensors, cu, longest, 4, 4, dropout_p=0.3, seed=1)

    assert torch.autograd.gradcheck(attend, tensors)


def test_a_sequence_does_not_see_its_neighbours():
    q, k, v, key, query, cu, longest = _inputs((50, 70, 20))
    alone = (x[50:120] for x in (q, k, v))
    expected = fastenc.disentangled_attention(
        *alone, key, query, testing.cu_seqlens_of((70,)), 70, 4, 6
    )
    for x in (q, k, v):
        x[:50], x[120:] = float("nan"), float("inf")
    out = fastenc.disentangled_attention(q, k, v, key, query, cu, longest, 4, 6)
    assert torch.equal(out[50:120], expected)


def test_without_tables_it_is_varlen_attention():
    q, k, v, _, _, cu, longest = _inputs((33, 100), head_dim=16)
    out = fastenc.disentangled_attention(q, k, v, None, None, cu, longest)
    expected = fastenc.varlen_attention(q, k, v, cu, longest)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_one_token_attends_to_itself_alone(backend, dropout_p):
    """Its gradients are exact, however large the scores."""
    *tensors, cu, longest = _inputs((1,) * 8, head_dim=64)
    tensors = [(12 * x).requires_grad_() for x in tensors]
    with fastenc.use_backend(backend):
        out = fastenc.disentangled_attention(
            *tensors, cu, longest, 4, 10, dropout_p=dropout_p, seed=1
        )
        cotangent = torch.randn_like(out)
        out.backward(cotangent)
    q, k, v, key, query = tensors
    assert torch.equal(v.grad, cotangent * (out != 0) / (1 - dropout_p))
    assert all((x.grad == 0).all() for x in (q, k, key, query))


def test_autocast_runs_in_the_lower_precision():
    args = _inputs((6,), grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastenc.disentangled_attention(*args, 4, 6)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in args[:5])


def test_inference_mode_leaves_nothing_that_training_could_not_use():
    args = _inputs((6,), grad=True)
    with torch.inference_mode():
        fastenc.disentangled_attention(*args, 4, 10)
    fastenc.disentangled_attention(*args, 4, 10).sum().backward()
    assert args[0].grad is not None


@pytest.mark.parametrize(("buckets", "far"), [(256, 512), (32, 64), (8, 20), (128, 2048), (4, 6)])
def test_buckets_are_those_of_transformers(buckets, far):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(-3 * far, 3 * far + 1)
    theirs = make_log_bucket_position(distance, buckets, far).long() + buckets
    theirs = theirs.clamp(0, 2 * buckets - 1)
    ours = relative_index(buckets, far)
    radius = len(ours) // 2
    assert torch.equal(ours[distance.clamp(-radius, radius) + radius].long(), theirs)


def test_the_table_of_rows_is_kept_for_each_device():
    for device in ("cpu", "meta", "cpu"):
        assert _index_for(torch.zeros(1, device=device), 4, 6).device.type == device


def transformers_attention(terms, share, heads, head_dim, buckets, far):
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = DebertaV2Config(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=list(terms),
        share_att_key=share,
        position_buckets=buckets,
        max_relative_positions=far,
        max_position_embeddings=512,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return DisentangledSelfAttention(config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("terms", [("c2p", "p2c"), ("c2p",), ("p2c",)])
@pytest.mark.parametrize(("buckets", "far"), [(16, 40), (-1, 48)])
def test_equals_transformers(terms, share, buckets, far, dtype):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    heads, head_dim, n = 2, 16, 90
    theirs = transformers_attention(terms, share, heads, head_dim, buckets, far).to(dtype)
    x = torch.randn(1, n, heads * head_dim, dtype=dtype, requires_grad=True)
    span = buckets if buckets > 0 else far
    relative = torch.randn(2 * span, heads * head_dim, dtype=dtype, requires_grad=True)
    distances = build_relative_position(x, x, bucket_size=buckets, max_position=far)
    mask = torch.ones(1, 1, n, n)
    expected = theirs(x, mask, relative_pos=distances, rel_embeddings=relative)[0][0]

    def split(y):
        return y.unflatten(-1, (heads, head_dim))

    key_proj = theirs.key_proj if share else getattr(theirs, "pos_key_proj", None)
    query_proj = theirs.query_proj if share else getattr(theirs, "pos_query_proj", None)
    out = fastenc.disentangled_attention(
        *(split(p(x[0])) for p in (theirs.query_proj, theirs.key_proj, theirs.value_proj)),
        split(key_proj(relative)).transpose(0, 1) if "c2p" in terms else None,
        split(query_proj(relative)).transpose(0, 1) if "p2c" in terms else None,
        testing.cu_seqlens_of((n,)),
        n,
        span,
        far if buckets > 0 else 0,
    ).flatten(1)
    exact = dtype == torch.float64
    # transformers takes the square root of the scale in float32
    torch.testing.assert_close(
        out, expected, atol=2e-7 if exact else 2e-6, rtol=2e-7 if exact else 2e-6
    )
    weights = torch.randn_like(out)
    leaves = [x, relative]
    ours = torch.autograd.grad((out * weights).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 if exact else 2e-4, rtol=2e-6 if exact else 2e-4)


def _misuse():
    q, k, v, key, query, cu, n = _inputs((2, 3))
    yield "k", (q, k[:4], v, key, query, cu, n, 4, 6), ValueError, "k: expected shape"
    yield "v dtype", (q, k, v.half(), key, query, cu, n, 4, 6), TypeError, "dtype of q"
    yield "table", (q, k, v, key, query, cu, n), ValueError, r"pos_key: expected shape \(2, 512, 8"
    yield "table dtype", (q, k, v, key, query.half(), cu, n, 4, 6), TypeError, "pos_query"
    yield "q", (q[0], k, v, key, query, cu, n, 4, 6), ValueError, "dimensions"
    yield "max_seqlen", (q, k, v, key, query, cu, 2, 4, 6), ValueError, "longest"
    yield "buckets", (q, k, v, key, query, cu, n, 0, 6), ValueError, "buckets >= 1"
    yield "odd buckets", (q, k, v, key, query, cu, n, 5, 6), ValueError, "even number"
    yield "far", (q, k, v, key, query, cu, n, 16, 8), ValueError, "max_positions"
    yield "no logarithm", (q, k, v, key, query, cu, n, 16, 9), ValueError, "max_positions"
    yield "bucket type", (q, k, v, key, query, cu, n, 4.0, 6), TypeError, "buckets"
    yield "dropout", (q, k, v, key, query, cu, n, 4, 6, None, 1.0), ValueError, "dropout_p"


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.disentangled_attention(*args)
