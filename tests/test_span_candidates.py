import sys

import op_tests
import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops._span_ref import span_candidates_ref

pytestmark = pytest.mark.usefixtures("two_threads")


def _cases():
    for case in list(testing.cases("span_score"))[2::4]:
        args, options = case.make(torch.float32)
        yield str(case), args, options.get("label_bias")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_candidates_are_those_of_the_scores(backend, dtype):
    for name, args, bias in _cases():
        *tensors, cu, width = args
        tensors = [(x * 0.3).to(dtype) for x in tensors]
        bias = None if bias is None else bias.to(dtype)
        wide = [x.double() for x in tensors]
        exact = span_candidates_ref(*wide, cu, width, 0.7, None if bias is None else bias.double())
        with fastenc.use_backend(backend), fastenc.record() as ran:
            word, span, label, score = fastenc.span_candidates(*tensors, cu, width, 0.7, bias)
        assert ran.calls == {"span_candidates": {backend: 1}} and not ran.fallbacks, name
        assert word.dtype == span.dtype == label.dtype == torch.int64
        assert score.dtype == torch.float32 and (score > 0.7).all(), name
        found = list(zip(word.tolist(), span.tolist(), label.tolist(), strict=True))
        assert found == sorted(set(found)), name
        theirs = dict(
            zip(zip(*(x.tolist() for x in exact[:3]), strict=True), exact[3].tolist(), strict=True)
        )
        ours = dict(zip(found, score.tolist(), strict=True))
        for key in ours.keys() & theirs.keys():
            assert abs(ours[key] - theirs[key]) < 1e-5, (name, key)
        for key in ours.keys() ^ theirs.keys():  # on the threshold itself
            assert abs((ours | theirs)[key] - 0.7) < 1e-5, (name, key)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    case = next(c for c in testing.cases("span_score") if "1000" in c.name)
    args, _ = case.make(torch.float32)
    expected = fastenc.span_candidates(*args, 0.6)
    torch.set_num_threads(threads)
    found = fastenc.span_candidates(*args, 0.6)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _inputs(lengths, r=20, labels=3):
    start, end = torch.randn(sum(lengths), r), torch.randn(sum(lengths), r)
    return start, end, torch.randn(len(lengths), labels, r), testing.cu_seqlens_of(lengths)


def test_thresholds_at_the_ends():
    inputs = _inputs((3, 1), r=4)
    word, width, _, _ = fastenc.span_candidates(*inputs, 5, 0.0)
    assert len(word) == (6 + 1) * 3  # every span that exists, none past the end
    assert (word + width < torch.where(word < 3, 3, 4)).all()
    assert all(len(x) == 0 for x in fastenc.span_candidates(*inputs, 5, 1.0))


def test_nan_is_no_candidate():
    start, end, labels, cu = _inputs((4,), r=4)
    start[1] = float("nan")
    assert 1 not in fastenc.span_candidates(start, end, labels, cu, 3, 0.0)[0].tolist()


@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_width_past_the_longest_sequence(backend):
    *inputs, cu = _inputs((6, 0, 300), labels=130)
    with fastenc.use_backend(backend):
        expected = fastenc.span_candidates(*inputs, cu, 300, 0.9)
        for width in (10**9, sys.maxsize):
            found = fastenc.span_candidates(*inputs, cu, width, 0.9)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("lengths", "labels"), [((), 3), ((0, 0), 3), ((4,), 0)])
def test_nothing_to_find(lengths, labels):
    for x in fastenc.span_candidates(*_inputs(lengths, labels=labels), 2, 0.1):
        assert x.shape == (0,)


def test_no_gradient_passes():
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in _inputs((5,))]
    assert not fastenc.span_candidates(*inputs, 3, 0.2)[3].requires_grad


def test_opcheck():
    for namespace in ("fastenc", "fastenc_reference", "fastenc_cpu"):
        op = getattr(torch.ops, namespace).span_candidates_fwd.default
        results = torch.library.opcheck(op, (*_inputs((3, 0, 6)), 4, 0.3, torch.randn(3, 3)))
        assert set(results.values()) == {"SUCCESS"}, (namespace, results)


def test_compiles():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        find = torch.compile(
            lambda *args: fastenc.span_candidates(*args, 4, 0.6)[3] * 2,
            backend=counter,
            fullgraph=True,
        )
        for n in (3, 7, 12, 33, 64):
            inputs = _inputs((n, n))
            expected = fastenc.span_candidates(*inputs, 4, 0.6)[3] * 2
            torch.testing.assert_close(find(*inputs), expected)
    assert counter.frame_count <= 2


def test_autocast_runs_in_the_lower_precision():
    inputs = _inputs((6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastenc.span_candidates(*inputs, 3, 0.5, torch.randn(1, 3) * 0)
    low = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    expected = fastenc.span_candidates(*low, 3, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("threshold", "error", "words"),
    [
        (-0.1, ValueError, "-0.1"),
        (1.5, ValueError, "1.5"),
        (float("nan"), ValueError, "nan"),
        ("0.5", TypeError, "str"),
        (True, TypeError, "bool"),
    ],
)
def test_misuse(threshold, error, words):
    with pytest.raises(error, match=words):
        fastenc.span_candidates(*_inputs((3,)), 2, threshold)
