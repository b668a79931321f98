import op_tests
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastenc
from fastenc import testing
from fastenc.ops.geglu import ACTIVATIONS, geglu_ref

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("geglu")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def test_opcheck():
    case = next(testing.cases("geglu"))
    for activation in ACTIVATIONS:
        op_tests.check_opcheck(case, (torch.randn(3, 10, requires_grad=True), activation))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    for case in testing.cases("geglu"):
        op_tests.check_repeatable(case, torch.float32, threads)


def test_threads_make_no_difference():
    for case in testing.cases("geglu"):
        op_tests.check_threads(case, torch.float32)


def test_compiles():
    op_tests.check_compiles(
        lambda x: fastenc.geglu(x), lambda n: (torch.randn(n, 16, requires_grad=True),)
    )


def test_strided_input():
    x = torch.randn(6, 40)[:, ::2]
    assert torch.equal(fastenc.geglu(x), fastenc.geglu(x.contiguous()))


def test_backward_leaves_the_input_alone():
    x = torch.randn(5, 64, requires_grad=True)
    before = x.detach().clone()
    fastenc.geglu(x).sum().backward()
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation):
    gate = torch.ones(6)
    a = torch.tensor([0.0, -0.0, 30.0, -30.0, float("nan"), 1e-30])
    expected = geglu_ref(torch.cat([a, gate]), activation)
    torch.testing.assert_close(
        fastenc.geglu(torch.cat([a, gate]), activation), expected, equal_nan=True
    )


def test_autocast_runs_in_the_lower_precision():
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastenc.geglu(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    """As torch's own rules do."""
    x = torch.randn(4, 32, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastenc.geglu(x), geglu_ref(x))


def test_gradcheck():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda x, a=activation: fastenc.geglu(x, a), (x,))


@pytest.mark.parametrize(
    ("x", "activation", "error", "words"),
    [
        (torch.randn(3, 5), "gelu", ValueError, "even size"),
        (torch.randn(()), "gelu", ValueError, "even size"),
        (torch.ones(3, 4, dtype=torch.int64), "gelu", TypeError, "int64"),
        ([1.0, 2.0], "gelu", TypeError, "list"),
        (torch.randn(3, 4), "relu", ValueError, "relu"),
    ],
)
def test_misuse(x, activation, error, words):
    with pytest.raises(error, match=words):
        fastenc.geglu(x, activation)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    inner=st.integers(0, 70),
    dtype=st.sampled_from(testing.DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_shape(rows, inner, dtype, activation):
    x = torch.randn(*rows, 2 * inner).to(dtype)
    y = fastenc.geglu(x, activation)
    assert y.shape == (*rows, inner) and y.dtype == dtype
    testing.assert_parity("out", y, geglu_ref(x, activation), geglu_ref(x.double(), activation))
