import itertools

import op_tests
import pytest
import torch
import torch.nn.functional as F

import fastenc
from fastenc import testing
from fastenc.ops._rules import layer_norm_precision
from fastenc.ops.add_layer_norm import add_layer_norm_inplace, add_layer_norm_ref

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("add_layer_norm")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def _arguments(rows=5, hidden=24):
    return [torch.randn(rows, hidden, requires_grad=True) for _ in range(2)] + [
        torch.randn(hidden, requires_grad=True) for _ in range(2)
    ]


def test_opcheck():
    x, residual, weight, bias = _arguments()
    case = next(testing.cases("add_layer_norm"))
    for r, b in itertools.product((residual, None), (bias, None)):
        op_tests.check_opcheck(case, (x, r, weight, b, 1e-5))
    mixed = (x.detach().bfloat16(), residual.detach(), weight.detach(), None, 1e-5)
    op_tests.check_opcheck(case, mixed)


def test_bit_equal_for_any_number_of_threads():
    case = list(testing.cases("add_layer_norm"))[12]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        args = [torch.randn(1000, 65, generator=torch.Generator().manual_seed(1))] * 2
        args += [torch.ones(65), torch.zeros(65)]
        results.append(testing.run_with_gradients(fastenc.add_layer_norm, tuple(args), {})[1])
        op_tests.check_repeatable(case, torch.float32, threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


def test_compiles():
    op_tests.check_compiles(
        lambda *args: fastenc.add_layer_norm(*args), lambda n: _arguments(rows=n)
    )


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(testing.DTYPES, testing.DTYPES)), ids=lambda d: str(d)
)
def test_mixed_dtypes_promote(dtypes):
    x, residual, weight, bias = _arguments()
    x, residual = x.detach().to(dtypes[0]), residual.detach().to(dtypes[1])
    expected = torch.promote_types(*dtypes)
    for backend in ("reference", "cpu"):
        with fastenc.use_backend(backend):
            args = (x, residual, weight.detach(), bias.detach())
            (normed, total), grads = testing.run_with_gradients(fastenc.add_layer_norm, args, {})
        assert normed.dtype == total.dtype == expected
        assert torch.equal(total, x + residual)
        assert [grads[f"argument {i}"].dtype for i in range(4)] == [
            *dtypes, torch.float32, torch.float32,
        ]  # fmt: skip
        exact, _ = add_layer_norm_ref(x.double(), residual.double(), weight, bias)
        plain, _ = add_layer_norm_ref(x, residual, weight, bias)
        testing.assert_parity("normed", normed, plain, exact)


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_eps(eps):
    """Rows whose variance is about eps."""
    args, _ = testing._add_layer_norm((9, 70), True, True)(torch.float32)
    args = (args[0] * eps**0.5, args[1] * eps**0.5, *args[2:])
    case = testing.Case("add_layer_norm", f"eps {eps}", lambda *_: (args, {"eps": eps}))
    op_tests.check_parity(case, torch.float32, "cpu")


@pytest.mark.parametrize("rows", [65, 2047, 2049, 2300])
def test_gradients_of_many_rows(rows):
    """The parameters' gradients are sums of at most 64 parts of 32 rows or more."""
    make = testing._add_layer_norm((rows, 5), True, True)
    case = testing.Case("add_layer_norm", str(rows), make)
    op_tests.check_parity(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_parameters_are_rounded_to_float32(dtype):
    x, residual = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype)
    weight, bias = (torch.randn(24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fastenc.add_layer_norm(x, residual, weight, bias)[0].float().sum().backward()
    assert weight.grad.dtype == torch.float64 and weight.grad.abs().min() > 0
    with torch.no_grad():
        expected = fastenc.add_layer_norm(x, residual, weight.float(), bias.float())
        for run in (fastenc.add_layer_norm, add_layer_norm_inplace):
            found = run(x.clone(), residual.clone(), weight, bias)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", ["x", "residual"])
def test_float64_on_either_side_is_float64(which):
    x, residual = (t.detach() for t in _arguments()[:2])
    weight, bias = torch.randn(2, 24, dtype=torch.float64)
    exact = add_layer_norm_ref(*(t.double() for t in (x, residual, weight, bias)))
    x, residual = (t.double() if name == which else t
                   for name, t in (("x", x), ("residual", residual)))  # fmt: skip
    found = fastenc.add_layer_norm(x, residual, weight, bias)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_without_residual_the_sum_is_x_itself():
    x, _, weight, _ = _arguments()
    normed, total = fastenc.add_layer_norm(x, None, weight)
    assert total is x
    torch.testing.assert_close(normed, F.layer_norm(x, (24,), weight))
    (normed.sum() + total.sum()).backward()
    assert x.grad is not None


def test_only_the_sum_is_used():
    x, residual, weight, bias = _arguments()
    fastenc.add_layer_norm(x, residual, weight, bias)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, x.grad)
    assert weight.grad is None


def test_one_pass_statistics_survive_a_large_mean():
    x = torch.randn(4, 768) + 1e4
    normed, _ = fastenc.add_layer_norm(x, None, torch.ones(768))
    exact = F.layer_norm(x.double(), (768,))
    testing.assert_parity("normed", normed, F.layer_norm(x, (768,)), exact)


def test_rows_far_from_zero_are_centred():
    """A rounded mean is off by half a unit of 1e4, a twentieth of the spread; torch's stays so."""
    x = (torch.randn(50, 768) * 0.01 + 1e4).requires_grad_()
    normed, _ = fastenc.add_layer_norm(x, None, torch.ones(768), eps=1e-12)
    rounding = 32 * torch.finfo(torch.float32).eps
    y = normed.detach().double()
    assert y.mean(-1).abs().max() < rounding
    assert (y.var(-1, unbiased=False) - 1).abs().max() < rounding
    normed.backward(normed.detach() + torch.randn(50, 768))
    dx = x.grad.double()
    assert (dx.mean(-1).abs() / dx.abs().amax(-1)).max() < rounding


def test_autocast_on_cpu_follows_torch():
    x, residual, weight, bias = _arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, total = fastenc.add_layer_norm(x.bfloat16(), residual, weight, bias)
        plain = F.layer_norm(x.bfloat16() + residual, (24,), weight, bias)
    assert normed.dtype == plain.dtype == total.dtype == torch.float32


def test_autocast_on_cuda_is_float32():
    x, weight = torch.randn(3, 8).half(), torch.randn(8, dtype=torch.float64)
    run = layer_norm_precision(torch.float16, "cuda", (x, None, weight, 1e-5))
    assert run[0].dtype == torch.float32 and run[1] is None
    assert run[2] is weight and run[3] == 1e-5


def _misuse():
    x, residual, weight, bias = _arguments()
    yield "residual shape", (x, residual[1:], weight, bias), ValueError, "residual"
    yield "integer residual", (x, residual.int(), weight, bias), TypeError, "residual: .*int32"
    elsewhere = residual.detach().to("meta")
    yield "residual elsewhere", (x, elsewhere, weight, bias), ValueError, "residual: .* device of x"
    elsewhere = bias.detach().to("meta")
    yield "bias elsewhere", (x, residual, weight, elsewhere), ValueError, "bias: .* device of x"
    yield "weight shape", (x, residual, weight[1:], bias), ValueError, "weight"
    yield "bias shape", (x, residual, weight, bias[None]), ValueError, "bias"
    yield "integer x", (x.int(), None, weight, bias), TypeError, "int32"
    yield "no weight", (x, residual, None, bias), TypeError, "NoneType"
    yield "empty rows", (x[:, :0], None, weight[:0]), ValueError, "hidden >= 1"


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.add_layer_norm(*args)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 37), (3, 4, 768)])
def test_in_place(shape, dtype):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    expected = fastenc.add_layer_norm(x, residual, weight, bias)
    with torch.no_grad():
        for backend in ("reference", "cpu"):
            op = getattr(torch.ops, f"fastenc_{backend}").add_layer_norm_inplace_fwd
            mine = x.clone(), residual.clone()
            op(*mine, weight, bias, 1e-5)
            if backend == "cpu":
                assert all(map(torch.equal, mine, expected))
            else:
                torch.testing.assert_close(mine, expected)
        mine = x.clone(), residual.clone()
        found = add_layer_norm_inplace(*mine, weight, bias)
    assert found[0] is mine[0] and found[1] is mine[1]
    assert all(map(torch.equal, found, expected))


def test_in_place_only_where_that_can_be():
    weight = torch.randn(8, requires_grad=True)

    def taken(x, residual) -> bool:
        before = x.clone(), residual.clone()
        expected = fastenc.add_layer_norm(x, residual, weight)
        found = add_layer_norm_inplace(x, residual, weight)
        assert all(map(torch.equal, found, expected))
        whole = found[0] is x and found[1] is residual
        assert whole or (torch.equal(x, before[0]) and torch.equal(residual, before[1]))
        return whole

    x = torch.randn(3, 8)
    assert not taken(x.clone(), x.clone())
    with torch.no_grad():
        assert taken(x.clone(), x.clone())
        assert not taken(x.double(), x.double())
        assert not taken(x.bfloat16(), x.clone())
        assert not taken(
            torch.randn(8, 3).t().clone(memory_format=torch.preserve_format), x.clone()
        )
        assert not taken(x.clone(), torch.randn(8, 3).t())
        with fastenc.use_backend("reference"):
            assert not taken(x.clone(), x.clone())


def test_in_place_misuse():
    op = torch.ops.fastenc.add_layer_norm_inplace_fwd
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="residual: expected"):
        op(x, x.bfloat16(), weight, None, 1e-5)
    with torch.no_grad(), pytest.raises(ValueError, match="residual: expected the shape of x"):
        add_layer_norm_inplace(x, x[:1].clone(), weight)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(torch.randn(8, 3).t(), x, weight, None, 1e-5)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(x, torch.randn(8, 3).t(), weight, None, 1e-5)
    with pytest.raises(RuntimeError, match="bias: expected"):
        op(x, x.clone(), weight, torch.ones(7), 1e-5)
    with pytest.raises(RuntimeError, match="weight: expected"):
        op(x, x.clone(), torch.ones(7), None, 1e-5)
