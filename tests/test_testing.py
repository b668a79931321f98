"""The parity rule itself: what every other test of numbers rests on can fail."""

from __future__ import annotations

import pytest
import torch

from fastenc import testing
from fastenc.testing import assert_parity, check_case, max_error

EXACT = torch.tensor([4.0, -1.0, 2.0], dtype=torch.float64)
PLAIN = EXACT.float() + torch.tensor([0.0, 1e-3, 0.0])
FLOOR = torch.finfo(torch.float32).eps * 4.0


def off(by: float) -> torch.Tensor:
    return EXACT.float() + torch.tensor([0.0, 0.0, by])


@pytest.mark.parametrize("by", [0.0, 1e-3, 1.9e-3, -1.9e-3])
def test_twice_the_error_of_plain_pytorch_is_allowed(by):
    assert_parity("out", off(by), PLAIN, EXACT)


@pytest.mark.parametrize("by", [2.1e-3, -2.1e-3, float("nan"), float("inf")])
def test_more_is_not(by):
    with pytest.raises(AssertionError, match="out: error"):
        assert_parity("out", off(by), PLAIN, EXACT)


def test_where_plain_pytorch_is_exact_one_rounding_is_allowed():
    plain = EXACT.float()
    assert_parity("out", off(0.9 * FLOOR), plain, EXACT)
    with pytest.raises(AssertionError, match="out: error"):
        assert_parity("out", off(3 * FLOOR), plain, EXACT)
    cancelled = 100.0  # a gradient's terms may have been larger than what is left of them
    assert_parity("gradient", off(3 * FLOOR), plain, EXACT, cancelled)
    with pytest.raises(AssertionError, match="gradient: error"):
        assert_parity("gradient", off(300 * FLOOR), plain, EXACT, cancelled)


@pytest.mark.parametrize(("found", "words"), [
    (None, "out: missing"),
    (PLAIN[:1], "out: shape"),
    (PLAIN[None], "out: shape"),
    (PLAIN.double(), "out: dtype"),
    (PLAIN.bfloat16(), "out: dtype"),
])  # fmt: skip
def test_what_is_of_another_kind(found, words):
    with pytest.raises(AssertionError, match=words):
        assert_parity("out", found, PLAIN, EXACT)


def test_what_is_no_number_must_be_none_in_the_reference_too():
    inf, nan = float("inf"), float("nan")
    exact = torch.tensor([inf, -inf, nan, 1.0])
    assert max_error(exact.clone(), exact) == 0.0
    for place, value in ((0, -inf), (0, 1.0), (0, nan), (2, 1.0), (2, inf), (3, nan), (3, inf)):
        found = exact.clone()
        found[place] = value
        assert max_error(found, exact) == inf, (place, value)
    assert max_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is ``factor`` times as large; None: there is none."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None if ctx.factor is None else grad * ctx.factor, None


def case_of(dtype, device="cpu", seed=0):
    return (torch.linspace(-2, 2, 12).to(dtype).view(3, 4),), {"bias": torch.ones(4).to(dtype)}


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("argument", ["argument 0", "bias"])
@pytest.mark.parametrize("factor", [1.0, 1.05, None])
def test_every_gradient_of_a_case_is_compared(factor, argument, dtype):
    def plain(x, bias):
        return x * bias, x + bias

    def found(x, bias):
        x, bias = (Scaled.apply(t, factor if name == argument else 1.0)
                   for name, t in (("argument 0", x), ("bias", bias)))  # fmt: skip
        return plain(x, bias)

    case = testing.Case("product", "of two", case_of)
    if factor == 1.0:
        check_case(found, plain, case, dtype)
        return
    words = "missing" if factor is None else "error"
    with pytest.raises(AssertionError, match=f"gradient of {argument}: {words}"):
        check_case(found, plain, case, dtype)


def test_every_output_of_a_case_is_compared():
    case = testing.Case("product", "of two", case_of)
    with pytest.raises(AssertionError, match="output 1: error"):
        check_case(lambda x, bias: (x * bias, x - bias), lambda x, bias: (x * bias, x + bias), case,
                   torch.float32)  # fmt: skip
