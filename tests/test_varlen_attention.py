import itertools
import os
import subprocess
import sys

import op_tests
import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops._philox import keep_mask

pytestmark = pytest.mark.usefixtures("two_threads")

WINDOWS = ((-1, -1), (0, 0), (1, 1), (16, 16), (64, 64), (-1, 0), (5, 17), (300, 7))


@op_tests.parity_params("varlen_attention")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


@op_tests.parity_params("rope_varlen_attention")
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_rope_parity(case, dtype, backend):
    op_tests.check_parity(case, dtype, backend)


def _case(op, lengths, heads, head_dim, window, *rest):
    make = (testing._attention if op == "varlen_attention" else testing._rope_attention)(
        lengths, heads, head_dim, window, *rest
    )
    return testing.Case(op, f"{lengths}-d{head_dim}-w{window}", make, {})


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [(321, 0, 1, 515), (2500, 3)], ids=str)
def test_parity_past_one_block_and_one_part(lengths, window):
    """Lengths at which keys come in several steps, packs and backward parts."""
    op_tests.check_parity(
        _case("varlen_attention", lengths, 1, 32, window, True, True), torch.float32, "cpu"
    )
    op_tests.check_parity(
        _case("rope_varlen_attention", lengths, 1, 32, window), torch.float32, "cpu"
    )


@pytest.mark.parametrize("window", [(149, 149), (149, 153), (141, 141), (141, 145), (153, 153),
                                    (153, 157)])  # fmt: skip
def test_windows_about_one_step(window):
    """Rounded to blocks of 8, 16 or 32 queries and 4 keys, 320 keys fit a step, 324 do not."""
    op_tests.check_parity(
        _case("varlen_attention", (700,), 1, 8, window, True, False), torch.float32, "cpu"
    )


@pytest.mark.parametrize("window", [(-1, -1), (4, 4)])
@pytest.mark.parametrize("backend", op_tests.BACKENDS)
def test_a_bias_whose_exponential_overflows(backend, window):
    case = _case("varlen_attention", (5, 700, 1, 41), 1, 16, window, False, True)

    def make(dtype, device):
        args, options = case.make(dtype, device)
        return args, {**options, "rel_bias": options["rel_bias"] + 89}

    op_tests.check_parity(testing.Case(case.op, case.name, make), torch.float32, backend)


def _packed(lengths, heads=2, head_dim=32, dtype=torch.float32):
    total = sum(lengths)
    qkv = torch.randn(total, 3, heads, head_dim).to(dtype)
    return qkv, testing.cu_seqlens_of(lengths, "cpu"), max([*lengths, 1])


def _attend(qkv, cu_seqlens, longest, window, **options):
    return fastenc.varlen_attention(*qkv.unbind(1), cu_seqlens, longest, window, **options)


def _gradient(qkv, cotangent, *args, **options):
    leaf = qkv.detach().requires_grad_()
    return torch.autograd.grad(_attend(leaf, *args, **options), leaf, cotangent)[0]


LENGTHS = (65, 0, 129, 1, 600, 33)


@pytest.mark.parametrize("window", WINDOWS)
def test_sequences_are_independent(window):
    """Bit-equal to each sequence alone, forward and backward, whatever NaNs the others hold."""
    qkv, cu_seqlens, longest = _packed(LENGTHS)
    cotangent = torch.randn(qkv.shape[0], *qkv.shape[2:])
    edges = cu_seqlens.tolist()
    for start, end in itertools.pairwise(edges):
        poisoned = torch.full_like(qkv, torch.nan)
        poisoned[start:end] = qkv[start:end]
        alone = testing.cu_seqlens_of((end - start,), "cpu"), end - start or 1, window
        together = cu_seqlens, longest, window
        expected = _attend(qkv[start:end], *alone)
        assert torch.equal(_attend(poisoned, *together)[start:end], expected)
        expected = _gradient(qkv[start:end], cotangent[start:end], *alone)
        assert torch.equal(_gradient(poisoned, cotangent, *together)[start:end], expected)


@pytest.mark.parametrize("window", [(-1, -1), (64, 64), (300, 7)])
def test_independent_of_threads(window):
    qkv, cu_seqlens, longest = _packed((700, 3, 4200), heads=1)  # two and three parts
    cotangent = torch.randn(qkv.shape[0], *qkv.shape[2:])
    rel_bias = torch.randn(1, 32)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        args = cu_seqlens, longest, window
        out = _attend(qkv, *args, rel_bias=rel_bias, dropout_p=0.1, seed=3)
        leaf = rel_bias.clone().requires_grad_()
        grad = _gradient(qkv, cotangent, *args, rel_bias=leaf, dropout_p=0.1, seed=3)
        results.append((out, grad))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_wide_window_is_no_window():
    qkv, cu_seqlens, longest = _packed(LENGTHS)
    unlimited = _attend(qkv, cu_seqlens, longest, (-1, -1))
    assert torch.equal(_attend(qkv, cu_seqlens, longest, (longest, longest)), unlimited)
    assert torch.equal(_attend(qkv, cu_seqlens, longest, (2**40, longest)), unlimited)


def test_strides_do_not_matter():
    qkv, cu_seqlens, longest = _packed(LENGTHS)
    expected = _attend(qkv, cu_seqlens, longest, (16, 16))
    heads_first = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert torch.equal(_attend(heads_first, cu_seqlens, longest, (16, 16)), expected)
    strided_rows = torch.stack([qkv, qkv], dim=-1)[..., 1]
    assert torch.equal(_attend(strided_rows, cu_seqlens, longest, (16, 16)), expected)


def test_each_of_q_k_v_has_strides_of_its_own():
    qkv, cu_seqlens, longest = _packed(LENGTHS)
    args = cu_seqlens, longest, (16, 16)
    expected = fastenc.varlen_attention(*qkv.unbind(1), *args)
    kinds = (
        lambda x: x.contiguous(),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    )
    for order in itertools.permutations(kinds):
        mixed = [kind(x) for kind, x in zip(order, qkv.unbind(1), strict=True)]
        assert torch.equal(fastenc.varlen_attention(*mixed, *args), expected)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_tables_of_any_dtype_and_strides(dtype):
    qkv, cu_seqlens, longest = _packed((65, 0, 9))
    cos, sin = (t.to(dtype) for t in testing.rope_tables(longest, 32))
    args = cu_seqlens, longest, (16, 16)
    expected = fastenc.rope_varlen_attention(qkv, cos.float(), sin.float(), *args)
    for spread in (lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
                   lambda t: torch.stack([t, t + 1], -1)[..., 0], lambda t: t):  # fmt: skip
        found = fastenc.rope_varlen_attention(qkv, spread(cos), spread(sin), *args)
        assert torch.equal(found, expected)
    q, k, v = qkv.unbind(1)
    bias = torch.randn(2, 9).to(dtype)
    wide, turned = torch.stack([bias, bias + 1], -1)[..., 0], bias.t().contiguous().t()
    raw = torch.ops.fastenc_cpu.varlen_attention_fwd
    expected, *found = (
        raw(q, k, v, cu_seqlens, longest, 2, 2, 0.3, 0.0, None, b)[0]
        for b in (bias.float(), wide, turned)
    )
    assert all(torch.equal(x, expected) for x in found)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("window", [(-1, -1), (5, 17)])
def test_dropout_mask_is_the_shared_one(p, window):
    """With v = one-hot of the key, the output is the dropped probability matrix itself."""
    length, heads, seed = 32, 3, torch.tensor([-(2**62) + 12345])
    lengths = (7, length)
    qkv, cu_seqlens, longest = _packed(lengths, heads)
    qkv[7:, 2] = torch.eye(length)[:, None]
    out = _attend(qkv, cu_seqlens, longest, window, dropout_p=p, seed=seed)[7:]
    full = _attend(qkv, cu_seqlens, longest, window)[7:]
    kept = keep_mask(torch.arange(7, 7 + length), length, heads, p, seed)
    expected = full.transpose(0, 1) * kept / (1 - p)
    torch.testing.assert_close(out.transpose(0, 1), expected)
    assert ((out == 0) == (expected.transpose(0, 1) == 0)).all()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("op", ["varlen_attention", "rope_varlen_attention"])
def test_dropout_parity(op, dtype):
    """The reference draws the same mask, so gradients through dropout obey the parity rule."""
    for window in ((-1, -1), (64, 64)):
        rest = (False, True) if op == "varlen_attention" else ()
        case = _case(op, (7, 130, 0, 400), 2, 32, window, *rest)
        args, options = case.make(dtype)
        options |= {"dropout_p": 0.2, "seed": torch.tensor([99])}
        same = testing.Case(op, case.name, lambda *_, a=args, o=options: (a, o), {})
        op_tests.check_parity(same, dtype, "cpu")


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)])
def test_no_memory_is_left_unwritten(window, monkeypatch):
    """Outputs and gradients are the same when fresh memory holds NaN."""
    qkv, cu_seqlens, longest = _packed((0, 65, 1, 0), head_dim=33)
    args = cu_seqlens, longest, window
    cotangent = torch.randn(qkv.shape[0], *qkv.shape[2:])
    expected = _attend(qkv, *args), _gradient(qkv, cotangent, *args)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        actual = _attend(qkv, *args), _gradient(qkv, cotangent, *args)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("window", [(-1, -1), (3, 5)])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_into_given_memory(dtype, window):
    """To the bit the op itself, with tables that are converted first."""
    qkv = torch.randn(40, 3, 2, 16).to(dtype)
    tables = (t.to(dtype) for t in testing.rope_tables(23, 16))
    args = (*tables, torch.tensor([0, 23, 23, 40], dtype=torch.int32), 23)
    for backend in ("reference", "cpu"):
        room = torch.full((40, 2, 16), float("nan"), dtype=dtype)
        op = getattr(torch.ops, f"fastenc_{backend}").rope_varlen_attention_into_fwd
        op(qkv, *args, *window, 0.25, room)
        with fastenc.use_backend(backend):
            assert torch.equal(room, fastenc.rope_varlen_attention(qkv, *args, window))


def test_into_memory_that_does_not_fit():
    qkv, tables = torch.randn(40, 3, 2, 16), testing.rope_tables(40, 16)
    packed = torch.tensor([0, 40], dtype=torch.int32), 40
    op = torch.ops.fastenc.rope_varlen_attention_into_fwd
    for shape in ((40, 2, 15), (40, 1, 16), (39, 2, 16), (40, 32)):
        with pytest.raises(RuntimeError, match="out: expected contiguous"):
            op(qkv, *tables, *packed, -1, -1, 1.0, torch.empty(shape))
    with pytest.raises(RuntimeError, match="out: expected"):
        op(qkv, *tables, *packed, -1, -1, 1.0, torch.empty(40, 2, 16).bfloat16())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """Parity of a few cases in a process of its own; an ISA that this machine lacks is skipped."""
    program = """
import op_tests, torch
from fastenc import testing
for op in ("varlen_attention", "rope_varlen_attention"):
    for i, case in enumerate(testing.cases(op)):
        if i % 3 == 0:
            op_tests.check_parity(case, testing.DTYPES[i % len(testing.DTYPES)], "cpu")
"""
    environment = {**os.environ, "FASTENC_CPU_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    if "is not possible on this machine" in done.stderr:
        pytest.skip(f"no {isa} on this machine")
    assert done.returncode == 0, done.stderr


def test_empty():
    qkv, _, _ = _packed(())
    for cu_seqlens in ([0], [0, 0], [0, 0, 0]):
        edges = torch.tensor(cu_seqlens, dtype=torch.int32)
        leaf = qkv.detach().requires_grad_()
        out = _attend(leaf, edges, 1, (-1, -1))
        out.sum().backward()
        assert out.shape == (0, 2, 32)
        assert leaf.grad.shape == leaf.shape


def test_autocast():
    qkv, cu_seqlens, longest = _packed((9, 20))
    leaf = qkv.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = _attend(leaf, cu_seqlens, longest, (4, 4))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_compiles():
    def make_args(total):
        qkv, cu_seqlens, _ = _packed((total // 2, total - total // 2))
        return qkv, cu_seqlens, total

    op_tests.check_compiles(lambda qkv, *rest: _attend(qkv, *rest, (4, 4)), make_args)


def test_repeatable():
    for case in list(testing.cases("varlen_attention", "small")):
        op_tests.check_repeatable(case, torch.float32, 2)


def test_a_float64_bias_is_rounded_to_float32():
    q, cu = torch.randn(9, 2, 8), testing.cu_seqlens_of((4, 5))
    bias = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    out = fastenc.varlen_attention(q, q, q, cu, 5, rel_bias=bias)
    out.sum().backward()
    assert bias.grad.dtype == torch.float64 and bias.grad.abs().max() > 0
    assert torch.equal(out, fastenc.varlen_attention(q, q, q, cu, 5, rel_bias=bias.float()))


@pytest.mark.parametrize("op", ["varlen_attention", "rope_varlen_attention",
                                "disentangled_attention"])  # fmt: skip
def test_a_head_wider_than_the_kernels_runs_in_plain_pytorch_and_says_so(op):
    cu = testing.cu_seqlens_of((4, 5))
    q, tables = torch.randn(9, 1, 258, requires_grad=True), torch.randn(2, 1, 16, 258)
    cos = torch.rand(5, 129)
    args = {
        "varlen_attention": (q, q, q, cu, 5),
        "rope_varlen_attention": (torch.stack([q] * 3, 1), cos, cos, cu, 5),
        "disentangled_attention": (q, q, q, *tables, cu, 5, 8, 0),
    }[op]
    run = getattr(fastenc, op)
    with fastenc.record() as ran:
        run(*args).sum().backward()
    assert ran.calls == {op: {"reference": 1}, f"{op}_bwd": {"reference": 1}}
    assert ran.fallbacks == [f"{op}: it serves head_dim up to 256, got 258, plain PyTorch runs"]
    with fastenc.use_backend("cpu"), pytest.raises(NotImplementedError, match="head_dim up to 256"):
        run(*args)


def test_a_seed_is_its_64_bits():
    q, cu = torch.randn(40, 2, 8), testing.cu_seqlens_of((40,))
    one, *others = (
        fastenc.varlen_attention(q, q, q, cu, 40, dropout_p=0.5, seed=seed)
        for seed in (2**64 - 3, -3, torch.tensor(-3), torch.tensor([[-3]]))
    )
    assert all(torch.equal(one, other) for other in others)
