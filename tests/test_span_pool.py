import op_tests
import pytest
import torch

import fastenc
from fastenc import testing

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("span_pool")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def test_opcheck():
    start, end = (torch.randn(9, 5, requires_grad=True) for _ in range(2))
    cu = testing.cu_seqlens_of((3, 0, 6))
    op_tests.check_opcheck(next(testing.cases("span_pool")), (start, end, cu, 4))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    for case in testing.cases("span_pool"):
        op_tests.check_repeatable(case, torch.float32, threads)


def test_compiles():
    def make(n):
        start, end = (torch.randn(2 * n, 8, requires_grad=True) for _ in range(2))
        return start, end, testing.cu_seqlens_of((n, n))

    op_tests.check_compiles(lambda s, e, cu: fastenc.span_pool(s, e, cu, 4), make)


def test_what_it_computes():
    start, end = torch.randn(5, 3), torch.randn(5, 3)
    out = fastenc.span_pool(start, end, testing.cu_seqlens_of((3, 2)), 4)
    for i, last in ((0, 2), (1, 2), (2, 2), (3, 4), (4, 4)):
        for w in range(4):
            expected = torch.relu(start[i] + end[i + w]) if i + w <= last else torch.zeros(3)
            assert torch.equal(out[i, w], expected), (i, w)


def test_strided_input():
    start, end = torch.randn(6, 40)[:, ::2], torch.randn(20, 6).T
    cu = testing.cu_seqlens_of((2, 4))
    expected = fastenc.span_pool(start.contiguous(), end.contiguous(), cu, 3)
    assert torch.equal(fastenc.span_pool(start, end, cu, 3), expected)


def test_gradcheck():
    start, end = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu = testing.cu_seqlens_of((2, 0, 4))
    assert torch.autograd.gradcheck(lambda s, e: fastenc.span_pool(s, e, cu, 3), (start, end))


def test_autocast_runs_in_the_lower_precision():
    start, end = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastenc.span_pool(start, end, testing.cu_seqlens_of((6,)), 3)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert start.grad.dtype == end.grad.dtype == torch.float32


def _misuse():
    x, cu = torch.randn(5, 4), torch.tensor([0, 2, 5], dtype=torch.int32)
    yield "list", ([1.0], x, cu, 3), TypeError, "list"
    yield "integers", (x.long(), x, cu, 3), TypeError, "int64"
    yield "one dimension", (x[0], x, cu, 3), ValueError, "dimensions"
    yield "shapes", (x, x[:4], cu, 3), ValueError, "shape of start"
    yield "dtypes", (x, x.bfloat16(), cu, 3), TypeError, "dtype of start"
    yield "device", (x, x.to("meta"), cu, 3), ValueError, "device of start"
    yield "cu_words dtype", (x, x, cu.long(), 3), TypeError, "int32"
    yield "cu_words end", (x, x, cu[:2], 3), ValueError, "cu_words"
    yield "no width", (x, x, cu, 0), ValueError, "max_width"
    yield "fractional width", (x, x, cu, 1.5), TypeError, "max_width"


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.span_pool(*args)
