import op_tests
import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops._token_ref import token_keep, token_score_ref

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("token_score")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def _inputs(lengths, d=8, r=20, labels=3, dtype=torch.float32, grad=False):
    words, seqs = sum(lengths), len(lengths)
    shapes = (words, r), (seqs, labels, r), (words, d), (seqs, labels, d), (r, d), (3, r)
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]
    return *tensors, testing.cu_seqlens_of(lengths)


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout):
    inputs = _inputs((3, 0, 6), grad=True)
    bias = None if dropout else torch.randn(3, requires_grad=True)
    options = (0.25, torch.tensor([7])) if dropout else (0.0, None)
    op_tests.check_opcheck(next(testing.cases("token_score")), (*inputs, bias, *options))


@pytest.mark.parametrize("threads", [1, 3])
def test_repeatable(threads):
    for case in testing.cases("token_score", "small"):
        op_tests.check_repeatable(case, torch.float32, threads)


def test_the_number_of_threads_changes_no_bit():
    """Over several passes of the backward: 69 words and 25 labels are 1725 pairs."""
    case = list(testing.cases("token_score"))[-1]
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(testing.run_with_gradients(fastenc.token_score, *case.make(torch.float32)))
    for outputs, grads in results[1:]:
        assert torch.equal(outputs[0], results[0][0][0])
        assert all(torch.equal(grads[key], results[0][1][key]) for key in grads)


def test_compiles():
    def make(n):
        return _inputs((n, n), grad=True)

    op_tests.check_compiles(lambda *args: fastenc.token_score(*args), make)


def test_gradcheck():
    *tensors, cu = _inputs((2, 0, 3), d=3, r=4, labels=2, dtype=torch.float64, grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def score(*args):
        *most, bias = args
        return fastenc.token_score(*most, cu, bias, dropout_p=0.4, seed=3)

    assert torch.autograd.gradcheck(score, (*tensors, bias))


@pytest.mark.parametrize(
    ("lengths", "labels", "d", "r"),
    [((), 3, 4, 8), ((0, 0), 3, 4, 8), ((4,), 0, 4, 8), ((4, 2), 3, 4, 0), ((4, 2), 3, 0, 8)],
)
def test_nothing_to_do(lengths, labels, d, r):
    inputs = _inputs(lengths, d=d, r=r, labels=labels, grad=True)
    twins = [x.detach().clone().requires_grad_() for x in inputs[:6]]
    bias = torch.randn(3)
    out = fastenc.token_score(*inputs, bias)
    expected = token_score_ref(*twins, inputs[6], bias)
    assert out.shape == (sum(lengths), labels, 3)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    if expected.requires_grad:
        expected.sum().backward()
    for x, twin in zip(inputs[:6], twins, strict=True):
        expected_grad = torch.zeros_like(twin) if twin.grad is None else twin.grad
        torch.testing.assert_close(x.grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_a_sequence_does_not_see_its_neighbours():
    token, label, factor, label_factor, weight, out_weight, cu = _inputs((10, 20, 10), d=30, r=300)
    alone = (token[10:30], label[1:2], factor[10:30], label_factor[1:2], weight, out_weight)
    before = fastenc.token_score(*alone, testing.cu_seqlens_of((20,)))
    for x in (token, factor):
        x[:10], x[30:] = float("nan"), float("inf")
    for x in (label, label_factor):
        x[0], x[2] = float("nan"), float("inf")
    after = fastenc.token_score(token, label, factor, label_factor, weight, out_weight, cu)
    assert torch.equal(after[10:30], before)


def test_strided_inputs():
    """The two thirds of proj_token's output are views of one tensor."""
    *_, weight, out_weight, cu = _inputs((5, 7), d=8, r=20)
    words, prompts = torch.randn(12, 2, 8), torch.randn(2, 3, 2, 8)
    token, label = torch.randn(20, 12).T, torch.randn(2, 20, 3).transpose(1, 2)
    args = (token, label, words[:, 1], prompts[:, :, 1], weight, out_weight)
    dense = [x.contiguous() for x in args]
    assert torch.equal(fastenc.token_score(*args, cu), fastenc.token_score(*dense, cu))


def test_dropout_is_the_documented_mask_on_both_backends():
    inputs = _inputs((5, 30), r=300)
    out = fastenc.token_score(*inputs, dropout_p=0.4, seed=11)
    with fastenc.use_backend("reference"):
        plain, exact = (
            fastenc.token_score(*(x.to(d) for x in inputs[:6]), inputs[6], dropout_p=0.4, seed=11)
            for d in (torch.float32, torch.float64)
        )
    testing.assert_parity("out", out, plain, exact)
    assert not torch.equal(out, fastenc.token_score(*inputs, dropout_p=0.4, seed=1))
    assert not torch.equal(out, fastenc.token_score(*inputs))
    keep = token_keep(torch.arange(35), 3, 300, 0.4, torch.tensor([11]))
    assert abs((keep > 0).double().mean() - 0.6) < 0.01
    torch.testing.assert_close(keep.max(), torch.tensor(1 / 0.6, dtype=torch.float64))


def test_a_kept_element_and_its_gradient_agree():
    """The backward makes the forward's mask again: both are linear in what was kept."""
    inputs = _inputs((60,), r=40, labels=30, grad=True)
    out = fastenc.token_score(*inputs, dropout_p=0.5, seed=2)
    out.sum().backward()
    torch.testing.assert_close((inputs[5].grad * inputs[5].detach()).sum(), out.sum())


def test_memory_stays_far_below_the_pairs():
    import resource

    inputs = _inputs((400,), d=16, r=2048, labels=25, grad=True)
    fastenc.token_score(*inputs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastenc.token_score(*inputs).sum().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 0.5 * 400 * 25 * 2048 * 4, f"{grown} KB"


def test_autocast_runs_in_the_lower_precision():
    inputs = _inputs((6,), grad=True)
    bias = torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastenc.token_score(*inputs, bias)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (*inputs[:6], bias))


def split(scorer, words, prompts):
    """gliner's Scorer split as ops/token_score.py says."""
    d = words.shape[-1]
    token, token_factor = scorer.proj_token(words).split(d, -1)
    label, label_factor = scorer.proj_label(prompts).split(d, -1)
    first, last = scorer.out_mlp[0], scorer.out_mlp[3]
    ours, labels, weight = first.weight.split(d, 1)
    token = torch.nn.functional.linear(token, ours, first.bias)
    return (token, label @ labels.T, token_factor, label_factor, weight, last.weight), last.bias


@pytest.mark.parametrize(("dtype", "d"), [(torch.float64, 24), (torch.float32, 128)])
def test_equals_gliners_scorer(dtype, d):
    from gliner.modeling.scorers import Scorer

    lengths = (9, 4, 1, 17)
    scorer = Scorer(d, dropout=0.0).to(dtype)
    words = [torch.randn(1, n, d, dtype=dtype, requires_grad=True) for n in lengths]
    prompts = torch.randn(len(lengths), 5, d, dtype=dtype, requires_grad=True)
    expected = torch.cat([scorer(x, prompts[i : i + 1])[0] for i, x in enumerate(words)])
    tensors, bias = split(scorer, torch.cat(words, 1)[0], prompts)
    out = fastenc.token_score(*tensors, testing.cu_seqlens_of(lengths), bias)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(expected)
    leaves = [*words, prompts, *scorer.parameters()]
    ours = torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=40 * tolerance, rtol=40 * tolerance)


def _misuse():
    args = _inputs((2, 3), d=4, r=6)
    bias = torch.randn(3)

    def but(index, x):
        return (*args[:index], x, *args[index + 1 :])

    yield "token", but(0, args[0][0]), ValueError, "token: expected 2 dimensions"
    yield "label", but(1, args[1][0]), ValueError, "label: expected 3 dimensions"
    yield "sequences", but(1, args[1][:1]), ValueError, r"label.*\(2, 3, 6\)"
    yield "words", but(2, args[2][:4]), ValueError, r"token_factor.*\(5, 4\)"
    yield "label_factor", but(3, args[3][:, :2]), ValueError, r"label_factor.*\(2, 3, 4\)"
    yield "weight", but(4, args[4].T), ValueError, r"weight.*\(6, 4\)"
    yield "out_weight", but(5, args[5][:2]), ValueError, r"out_weight.*\(3, 6\)"
    yield "dtype", but(4, args[4].half()), TypeError, "weight.*dtype of token"
    yield "cu", but(6, args[6] + 1), ValueError, "cu_words"
    yield "bias shape", (*args, bias[:2]), ValueError, "out_bias"
    yield "bias dtype", (*args, bias.half()), TypeError, "out_bias"
    yield "dropout", (*args, None, 1.0), ValueError, "dropout_p"
    yield "seed", (*args, None, 0.5, "7"), TypeError, "seed"
    yield "no tensor", but(4, [1.0]), TypeError, "weight: expected a tensor"


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.token_score(*args)
