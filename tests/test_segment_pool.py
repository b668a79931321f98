import op_tests
import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.nn import POOLING_MODES, pool
from fastenc.ops.segment_pool import MODES

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("segment_pool")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    x = torch.randn(9, 5, requires_grad=True)
    cu = testing.cu_seqlens_of((3, 0, 6))
    op_tests.check_opcheck(next(testing.cases("segment_pool")), (x, cu, mode))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    for case in testing.cases("segment_pool"):
        op_tests.check_repeatable(case, torch.float32, threads)


def test_threads_make_no_difference():
    for case in testing.cases("segment_pool"):
        op_tests.check_threads(case, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_compiles(mode):
    def make(n):
        return torch.randn(2 * n, 8, requires_grad=True), testing.cu_seqlens_of((n, n))

    op_tests.check_compiles(lambda x, cu: fastenc.segment_pool(x, cu, mode), make)


@pytest.mark.parametrize("mode", MODES)
def test_empty_sequences_are_zeros_and_get_no_gradient(mode):
    x = torch.randn(3, 20, requires_grad=True)
    out = fastenc.segment_pool(x, testing.cu_seqlens_of((0, 3, 0)), mode)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 20))
    out.sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(20.0))


@pytest.mark.parametrize("mode", MODES)
def test_more_columns_than_a_task(mode):
    make = testing._segment_pool((3, 0, 70, 1), 600, mode)
    op_tests.check_parity(testing.Case("segment_pool", mode, make), torch.float32, "cpu")


def test_a_sum_that_cancels_and_infinite_terms():
    x = torch.tensor([[3e7, torch.inf], [1.0, 2.0], [-3e7, 1.0]])
    out = fastenc.segment_pool(x, testing.cu_seqlens_of((3,)))
    testing.assert_parity("mean", out, x.mean(0)[None], x.double().mean(0)[None])
    assert out[0, 0] == torch.tensor(1.0) / 3 and out[0, 1] == torch.inf


def test_raw_backward_is_memory_safe():
    cu, grad = testing.cu_seqlens_of((3, 2)), torch.ones(2, 4)
    index = torch.full((2, 4), 3, dtype=torch.int32)
    backward = torch.ops.fastenc_cpu.segment_pool_bwd
    for bad in (index - 4, index + 2, index):  # before, after, the first's in the second
        with pytest.raises(RuntimeError, match="outside its sequence"):
            backward(grad, bad, cu, 5, "max")
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        backward(grad, index, cu + 7, 5, "mean")


def test_no_sequences():
    out = fastenc.segment_pool(torch.randn(0, 4), torch.zeros(1, dtype=torch.int32))
    assert out.shape == (0, 4)


def test_maximum_takes_the_first_of_equals_and_of_nans():
    nan = float("nan")
    x = torch.tensor([[1.0, 5.0, nan], [1.0, nan, nan], [0.0, 9.0, 7.0]], requires_grad=True)
    out = fastenc.segment_pool(x, testing.cu_seqlens_of((3,)), "max")
    assert out[0, 0] == 1 and out[0, 1:].isnan().all()
    out.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_does_not_see_its_neighbours(mode):
    x = torch.randn(30, 7)
    cu = testing.cu_seqlens_of((10, 10, 10))
    before = fastenc.segment_pool(x, cu, mode)
    x[:10], x[20:] = float("nan"), float("inf")
    assert torch.equal(fastenc.segment_pool(x, cu, mode)[1], before[1])


def _misuse():
    x = torch.randn(5, 4)
    int32 = {"dtype": torch.int32}
    yield "decreasing", (x, torch.tensor([0, 4, 2, 5], **int32)), ValueError, "non-decreasing"
    elsewhere = torch.tensor([0, 5], **int32).to("meta")
    yield "elsewhere", (x, elsewhere), ValueError, "cu_seqlens: .* device of the packed"
    yield "integers", (x.int(), torch.tensor([0, 5], **int32)), TypeError, "x: expected a floating"
    yield "wrong end", (x, torch.tensor([0, 4], **int32)), ValueError, "total_tokens = 5"
    yield "wrong start", (x, torch.tensor([1, 5], **int32)), ValueError, "from 0"
    yield "int64", (x, torch.tensor([0, 5])), TypeError, "int32"
    yield "no entries", (x, torch.zeros(0, **int32)), ValueError, "num_seqs"
    yield "not a tensor", (x, [0, 5]), TypeError, "list"
    yield "one dimension", (x[0], torch.tensor([0, 5], **int32)), ValueError, "dimensions"
    yield "mode", (x, torch.tensor([0, 5], **int32), "median"), ValueError, "median"


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.segment_pool(*args)


# ---- every mode of sentence-transformers ---------------------------------------------------------


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_no_tokens_gives_zeros(mode, dtype):
    x = torch.randn(3, 4, dtype=dtype)
    rows = pool(x, testing.cu_seqlens_of((0, 3, 0)), (mode,))
    assert torch.equal(rows[::2], torch.zeros(2, 4, dtype=dtype)) and rows[1].any()


def test_weights_count_on_from_tokens_that_were_skipped():
    x, skipped = torch.randn(5, 4, dtype=torch.float64), torch.tensor([2, 0])
    found = pool(x, testing.cu_seqlens_of((3, 2)), ("weightedmean",), skipped)
    first, second = torch.tensor([[3.0], [4.0], [5.0]]), torch.tensor([[1.0], [2.0]])
    expected = [(x[:3] * first).sum(0) / 12, (x[3:] * second).sum(0) / 3]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-14, rtol=1e-14)


def test_modes_are_concatenated_and_named():
    x, cu = torch.randn(5, 4), testing.cu_seqlens_of((3, 2))
    both = pool(x, cu, ("max", "mean_sqrt_len_tokens"))
    assert torch.equal(both[:, :4], fastenc.segment_pool(x, cu, "max"))
    torch.testing.assert_close(both[0, 4:], x[:3].sum(0) / 3**0.5)
    with pytest.raises(ValueError, match=r"pooling: expected one of mean, .* got 'median'"):
        pool(x, cu, ("mean", "median"))
