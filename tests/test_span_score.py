import op_tests
import pytest
import torch
from torch import nn

import fastenc
from fastenc import testing
from fastenc.ops._span_ref import span_keep, span_score_ref

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("span_score")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def _inputs(lengths, r=20, labels=3, dtype=torch.float32, grad=False):
    start, end = (torch.randn(sum(lengths), r, dtype=dtype, requires_grad=grad) for _ in range(2))
    vectors = torch.randn(len(lengths), labels, r, dtype=dtype, requires_grad=grad)
    return start, end, vectors, testing.cu_seqlens_of(lengths)


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout):
    inputs = _inputs((3, 0, 6), grad=True)
    bias = None if dropout else torch.randn(3, 3, requires_grad=True)
    options = (0.25, torch.tensor([7])) if dropout else (0.0, None)
    op_tests.check_opcheck(next(testing.cases("span_score")), (*inputs, 4, bias, *options))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    for case in testing.cases("span_score"):
        op_tests.check_repeatable(case, torch.float32, threads)


def test_the_number_of_threads_changes_no_bit():
    case = next(c for c in testing.cases("span_score") if "1000" in c.name)
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(testing.run_with_gradients(fastenc.span_score, *case.make(torch.float32)))
    for outputs, grads in results[1:]:
        assert torch.equal(outputs[0], results[0][0][0])
        assert all(torch.equal(grads[key], results[0][1][key]) for key in grads)


def test_compiles():
    def make(n):
        return _inputs((n, n), grad=True)

    op_tests.check_compiles(lambda *args: fastenc.span_score(*args, 4), make)


def test_gradcheck():
    *tensors, cu = _inputs((2, 0, 4), r=3, labels=2, dtype=torch.float64, grad=True)
    bias = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def score(start, end, labels, bias):
        out = fastenc.span_score(start, end, labels, cu, 3, bias, dropout_p=0.4, seed=3)
        return out[out > float("-inf")]

    assert torch.autograd.gradcheck(score, (*tensors, bias))


def test_past_the_end_is_minus_infinity_and_has_no_gradient():
    inputs = _inputs((3, 0, 1), grad=True)
    out = fastenc.span_score(*inputs, 5)
    gone = torch.tensor(
        [[False] * (3 - i) + [True] * (2 + i) for i in range(3)] + [[False] + [True] * 4]
    )
    assert torch.equal(out.isneginf().all(-1), gone) and torch.equal(out.isneginf().any(-1), gone)
    poisoned = torch.ones_like(out).masked_fill(gone.unsqueeze(-1), float("nan"))
    out.backward(poisoned)
    assert all(x.grad.isfinite().all() for x in inputs[:3])


@pytest.mark.parametrize(
    ("lengths", "labels", "r"), [((), 3, 8), ((0, 0), 3, 8), ((4,), 0, 8), ((4, 2), 3, 0)]
)
def test_nothing_to_do(lengths, labels, r):
    inputs = _inputs(lengths, r=r, labels=labels, grad=True)
    out = fastenc.span_score(*inputs, 2)
    assert out.shape == (sum(lengths), 2, labels)
    assert torch.equal(out, span_score_ref(*inputs, 2))
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs[:3])


def test_a_sequence_does_not_see_its_neighbours():
    start, end, labels, cu = _inputs((10, 20, 10), r=50)
    alone = (start[10:30], end[10:30], labels[1:2], testing.cu_seqlens_of((20,)))
    before = fastenc.span_score(*alone, 6)
    for x in (start, end):
        x[:10], x[30:] = float("nan"), float("inf")
    labels[0], labels[2] = float("nan"), float("inf")
    assert torch.equal(fastenc.span_score(start, end, labels, cu, 6)[10:30], before)


def test_one_label_set_for_all_sequences_is_not_copied():
    start, end, labels, cu = _inputs((7, 9, 2), labels=4)
    shared = labels[:1].requires_grad_()
    copied = labels[:1].detach().repeat(3, 1, 1).requires_grad_()
    out = fastenc.span_score(start, end, shared.expand(3, -1, -1), cu, 3)
    expected = fastenc.span_score(start, end, copied, cu, 3)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    for x in (out, expected):
        (x * weights)[x > float("-inf")].sum().backward()
    torch.testing.assert_close(shared.grad, copied.grad.sum(0, keepdim=True))


def test_dropout_is_the_documented_mask_on_both_backends():
    start, end, labels, cu = _inputs((5, 30), r=300)
    out = fastenc.span_score(start, end, labels, cu, 4, dropout_p=0.4, seed=11)
    with fastenc.use_backend("reference"):
        plain, exact = (
            fastenc.span_score(*(x.to(d) for x in (start, end, labels)), cu, 4, None, 0.4, 11)
            for d in (torch.float32, torch.float64)
        )
    testing.assert_parity("out", out, plain, exact)
    assert torch.equal(out, fastenc.span_score(start, end, labels, cu, 4, dropout_p=0.4, seed=11))
    assert not torch.equal(
        out, fastenc.span_score(start, end, labels, cu, 4, dropout_p=0.4, seed=1)
    )
    assert not torch.equal(out, fastenc.span_score(start, end, labels, cu, 4, dropout_p=0.4))
    keep = span_keep(torch.arange(35), 4, 300, 0.4, torch.tensor([11]))
    assert abs((keep > 0).double().mean() - 0.6) < 0.01
    torch.testing.assert_close(keep.max(), torch.tensor(1 / 0.6, dtype=torch.float64))


def test_a_kept_element_and_its_gradient_agree():
    """The backward makes the forward's mask again: both are linear in what was kept."""
    start, end, labels, cu = _inputs((6,), r=40, grad=True)
    out = fastenc.span_score(start, end, labels, cu, 3, dropout_p=0.5, seed=2)
    valid = out > float("-inf")
    out[valid].sum().backward()
    torch.testing.assert_close((labels.grad * labels.detach()).sum(), out[valid].sum())


def test_memory_stays_far_below_the_spans():
    import resource

    inputs = _inputs((384,), r=2048, labels=10, grad=True)
    fastenc.span_score(*inputs, 12)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = fastenc.span_score(*inputs, 12)
    out[out > float("-inf")].sum().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 0.6 * 384 * 12 * 2048 * 4, f"{grown} KB"


def test_autocast_runs_in_the_lower_precision():
    inputs = _inputs((6,), grad=True)
    bias = torch.randn(1, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastenc.span_score(*inputs, 3, bias)
    assert out.dtype == torch.bfloat16
    out[out > float("-inf")].float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (*inputs[:3], bias))


def fold(layer, words, prompts):
    """gliner's SpanMarkerV0 folded as ops/span_score.py says."""
    first, last = layer.out_project[0], layer.out_project[3]
    d = words.shape[-1]
    start = nn.functional.linear(layer.project_start(words).relu(), first.weight[:, :d])
    end = nn.functional.linear(layer.project_end(words).relu(), first.weight[:, d:], first.bias)
    return start, end, prompts @ last.weight, prompts @ last.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_gliners_marker_v0(dtype):
    from gliner.modeling.span_rep import SpanMarkerV0

    width, lengths = 6, (9, 4, 1, 17)
    layer = SpanMarkerV0(32, width, dropout=0.0).to(dtype)
    words = [torch.randn(1, n, 32, dtype=dtype, requires_grad=True) for n in lengths]
    prompts = torch.randn(len(lengths), 5, 32, dtype=dtype, requires_grad=True)
    expected = []
    for x, prompt in zip(words, prompts, strict=True):
        n = x.shape[1]
        spans = torch.tensor([[(i, min(i + w, n - 1)) for i in range(n) for w in range(width)]])
        expected.append(torch.einsum("lkd,cd->lkc", layer(x, spans)[0], prompt))
    expected = torch.cat(expected)
    start, end, labels, bias = fold(layer, torch.cat(words, 1)[0], prompts)
    out = fastenc.span_score(start, end, labels, testing.cu_seqlens_of(lengths), width, bias)
    valid = out > float("-inf")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(out[valid], expected[valid], atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(expected[valid])
    leaves = [*words, prompts, *layer.parameters()]
    ours = torch.autograd.grad((out[valid] * weights).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected[valid] * weights).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=40 * tolerance, rtol=40 * tolerance)


def _misuse():
    start, end, labels, cu = _inputs((2, 3), r=4)
    bias = torch.randn(2, 3)
    yield "labels", (start, end, labels[0], cu, 3), ValueError, "labels.*dimensions"
    yield "sequences", (start, end, labels[:1], cu, 3), ValueError, "num_seqs = 2"
    yield "size", (start, end, labels[..., :3], cu, 3), ValueError, "R = 4"
    yield "label dtype", (start, end, labels.half(), cu, 3), TypeError, "labels.*dtype of start"
    yield "bias shape", (start, end, labels, cu, 3, bias[:, :2]), ValueError, "label_bias"
    yield "bias dtype", (start, end, labels, cu, 3, bias.half()), TypeError, "label_bias"
    yield "width", (start, end, labels, cu, 0), ValueError, "max_width"
    yield "dropout", (start, end, labels, cu, 3, None, 1.0), ValueError, "dropout_p"
    yield "seed", (start, end, labels, cu, 3, None, 0.5, "7"), TypeError, "seed"


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.span_score(*args)
