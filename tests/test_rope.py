import op_tests
import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops.rope import rope_ref

pytestmark = pytest.mark.usefixtures("two_threads")


@op_tests.parity_params("rope")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def _arguments(total=9, heads=2, head_dim=8, max_pos=20):
    cos, sin = testing.rope_tables(max_pos, head_dim)
    x = torch.randn(total, heads, head_dim, requires_grad=True)
    return x, cos, sin, torch.randint(0, max_pos, (total,))


def test_opcheck():
    op_tests.check_opcheck(next(testing.cases("rope")), _arguments())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeatable(threads):
    for case in testing.cases("rope"):
        op_tests.check_repeatable(case, torch.float32, threads)


def test_threads_make_no_difference():
    for case in testing.cases("rope"):
        op_tests.check_threads(case, torch.float32)


def test_compiles():
    op_tests.check_compiles(lambda *args: fastenc.rope(*args), lambda n: _arguments(total=n))


def test_tables_of_another_dtype_and_int32_positions():
    x, cos, sin, positions = _arguments()
    lower = x.detach().bfloat16()
    y = fastenc.rope(lower, cos, sin, positions.int())
    assert y.dtype == torch.bfloat16
    exact = rope_ref(lower.double(), cos.double(), sin.double(), positions)
    plain = rope_ref(lower, cos.bfloat16(), sin.bfloat16(), positions)
    testing.assert_parity("out", y, plain, exact)


def test_float64_tables_are_rounded_to_float32():
    x, cos, sin, positions = _arguments()
    expected = fastenc.rope(x, cos, sin, positions)
    assert torch.equal(fastenc.rope(x, cos.double(), sin.double(), positions), expected)
    qkv, cu = torch.randn(9, 3, 2, 8), testing.cu_seqlens_of((4, 5))
    expected = fastenc.rope_varlen_attention(qkv, cos, sin, cu, 5)
    found = fastenc.rope_varlen_attention(qkv, cos.double(), sin.double(), cu, 5)
    assert torch.equal(found, expected)


def test_float64_tables_beside_float64_are_exact():
    x, cos, sin, positions = _arguments()
    x, cos, sin = x.detach().double(), cos.double() + 1e-9, sin.double() - 1e-9
    expected = rope_ref(x, cos, sin, positions)
    torch.testing.assert_close(
        fastenc.rope(x, cos, sin, positions), expected, atol=1e-15, rtol=1e-15
    )


def test_strides_do_not_matter():
    x, cos, sin, positions = _arguments()
    expected = fastenc.rope(x, cos, sin, positions)

    def wide(t):
        return torch.stack([t, t + 1], -1)[..., 0]

    heads_first = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    for changed in (
        (wide(x), cos, sin, positions),
        (heads_first, cos, sin, positions),
        (x, wide(cos), sin, positions),
        (x, cos, wide(sin), positions),
        (x, cos, sin, wide(positions)),
    ):
        assert torch.equal(fastenc.rope(*changed), expected)
    first_and_last = torch.stack([x, x + 1, 2 * x], 1)[:, ::2]
    found = fastenc.rope(first_and_last, cos, sin, positions)
    assert torch.equal(found, fastenc.rope(first_and_last.contiguous(), cos, sin, positions))


def test_rotation_preserves_norm_and_inverts():
    x, cos, sin, positions = _arguments()
    y = fastenc.rope(x, cos, sin, positions)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(fastenc.rope(y, cos, -sin, positions), x)


def test_transformers_rotation():
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    x, cos, sin, _ = _arguments(total=20, max_pos=20)
    wide = torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    heads_first = x.detach().transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, *wide)
    y = fastenc.rope(x.detach(), cos, sin, torch.arange(20))
    torch.testing.assert_close(y, expected[0].transpose(0, 1))


def test_autocast():
    x, cos, sin, positions = _arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastenc.rope(x, cos, sin, positions)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def _misuse():
    x, cos, sin, positions = _arguments()
    yield "positions too large", (x, cos, sin, positions + 20), ValueError, "0 to 19"
    yield "negative position", (x, cos, sin, positions - 20), ValueError, "0 to 19"
    yield "too few positions", (x, cos, sin, positions[1:]), ValueError, "total_tokens = 9"
    yield "float positions", (x, cos, sin, positions.float()), TypeError, "int32 or int64"
    yield "narrow tables", (x, cos[:, 1:], sin[:, 1:], positions), ValueError, "head_dim 8"
    yield "tables differ", (x, cos, sin[1:], positions), ValueError, "shape of cos"
    yield "dtypes differ", (x, cos, sin.half(), positions), TypeError, "dtype of cos"
    yield "one table row", (x, cos[0], sin[0], positions), ValueError, "cos: expected 2 dim"
    yield "integers", (x.int(), cos, sin, positions), TypeError, "x: expected a floating"
    yield "tables elsewhere", (x, cos.to("meta"), sin, positions), ValueError, "cos: .* device of x"
    elsewhere = positions.to("meta")
    yield "positions elsewhere", (x, cos, sin, elsewhere), ValueError, "positions: .* device of x"
    yield "positions of a list", (x, cos, sin, [0]), TypeError, "positions: .*list"
    yield "odd head_dim", (x[..., 1:], cos, sin, positions), ValueError, "even head_dim"
    yield "two dimensions", (x[:, 0], cos, sin, positions), ValueError, "dimensions"
    yield (
        "table wants a gradient",
        (x, cos.clone().requires_grad_(), sin, positions),
        ValueError,
        "grad",
    )


@pytest.mark.parametrize(("name", "args", "error", "words"), _misuse(), ids=lambda v: str(v)[:20])
def test_misuse(name, args, error, words):
    with pytest.raises(error, match=words):
        fastenc.rope(*args)


def test_raw_op_is_memory_safe():
    x, cos, sin, positions = _arguments()
    with pytest.raises(RuntimeError, match="positions"):
        torch.ops.fastenc_cpu.rope_fwd(x.detach(), cos, sin, positions + 1000)
    with pytest.raises(RuntimeError, match="positions"):
        torch.ops.fastenc_cpu.rope_fwd(x.detach(), cos, sin, positions - 1000)
