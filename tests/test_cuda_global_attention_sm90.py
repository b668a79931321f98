"""Attention without a window for Hopper, no GPU: its code on the CPU, and what it compiles to."""

from __future__ import annotations

import ctypes

import cuda_model
import cuda_sass
import pytest
import torch
from cuda_model import DTYPES
from test_cuda_attention_model import Case, Problem

from fastenc import testing

# (case, blocks): fewer blocks than work items, so that rings go round from one item to the next.
CASES = [
    (Case((70, 0, 300, 1), heads=2, rope=True), 3),
    (Case((257,), rope=True, packed=False), 1),
    (Case((128, 129), head_dim=128, rope=True, scale=0.3), 2),
    (Case((260, 5), head_dim=32), 2),
]
GRAD_CASES = [
    (Case((70, 0, 140, 1), rope=True), 3),
    (Case((129,), head_dim=128, rope=True, packed=False, scale=0.3), 1),
    (Case((64, 3), head_dim=32, heads=2), 2),
]


def runs(cases):
    return [(*c, torch.bfloat16) for c in cases] + [(*cases[0], torch.float16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    library = cuda_model.compile_model("global_attention_sm90", tmp_path_factory.mktemp("model"))
    library.args_size.restype = ctypes.c_int64
    assert library.args_size() == ctypes.sizeof(cuda_model.AttentionArgs)
    return library


def run(model, problem, blocks, late=1, backwards=0):
    args, out, lse = problem.args()
    dtype = DTYPES[problem.dtype]
    assert model.run_global_fwd(ctypes.byref(args), dtype, blocks, late, backwards)
    return out, lse


@pytest.mark.parametrize(("case", "blocks", "dtype"), runs(CASES), ids=str)
def test_forward(model, case, blocks, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)
    out, lse = run(model, problem, blocks)
    testing.assert_parity("out", out, plain[0], exact[0])
    allowed = 2 * testing.max_error(plain[1], exact[1]) if case.rope else 0.0  # q and k are rounded
    assert testing.max_error(lse, exact[1]) <= allowed + 2e-5
    again = run(model, problem, blocks, late=0, backwards=1)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), "depends on the order"


def gradients(model, problem, blocks, late=1, backwards=0):
    args, out, _ = problem.args()
    how = (DTYPES[problem.dtype], blocks, late, backwards)
    assert model.run_global_fwd(ctypes.byref(args), *how)
    total, heads, head_dim = out.shape
    grads = list(cuda_model.poisoned(total, 3, heads, head_dim, dtype=out.dtype).unbind(1))
    delta = cuda_model.poisoned(heads, total, dtype=torch.float32)
    call = cuda_model.AttentionGradArgs(
        args, *map(cuda_model.HeadRows.of, (problem.grad, *grads)),
        problem.grad_lse.data_ptr(), delta.data_ptr(), None, problem.scale,
    )  # fmt: skip
    assert model.run_global_bwd(ctypes.byref(call), *how)
    return grads


@pytest.mark.parametrize(("case", "blocks", "dtype"), runs(GRAD_CASES), ids=str)
def test_backward(model, case, blocks, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)[2:]
    largest = max(float(x.abs().max()) for x in exact)
    actual = gradients(model, problem, blocks)
    for name, a, b, c in zip(("dq", "dk", "dv"), actual, plain, exact[2:], strict=True):
        testing.assert_parity(name, a, b, c, cancelled=largest)
    again = gradients(model, problem, blocks, late=0, backwards=1)
    assert all(map(torch.equal, actual, again)), "depends on the order"


def test_neighbours_do_not_leak_into_gradients(model):
    problem = Problem(Case((30, 50, 40), rope=True), torch.bfloat16)
    grads = gradients(model, problem, 2)
    for x in (problem.q, problem.k, problem.v, problem.grad):
        x[30:80] = float("nan")
    others = [*range(30), *range(80, 120)]
    for before, after in zip(grads, gradients(model, problem, 2), strict=True):
        assert torch.equal(before[others], after[others])


def test_neighbours_do_not_leak(model):
    problem = Problem(Case((70, 90, 40), heads=2, rope=True), torch.bfloat16)
    out, lse = run(model, problem, 2)
    for x in (problem.q, problem.k, problem.v):
        x[70:160] = float("nan")
    others = [*range(70), *range(160, 200)]
    poisoned, poisoned_lse = run(model, problem, 2)
    assert torch.equal(out[others], poisoned[others])
    assert torch.equal(lse[:, others], poisoned_lse[:, others])


@pytest.mark.parametrize("lengths", [(5,), (0, 3, 0), (128, 129, 1, 0, 500, 500, 127)] * 2)
def test_longest_first(model, lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    for n in (len(lengths), 700):
        sizes = torch.tensor(lengths)[torch.randint(len(lengths), (n,), generator=generator)]
        cu = testing.cu_seqlens_of(sizes.tolist())
        order, first = torch.full((n,), -1).int(), torch.full((n + 1,), -1).int()
        model.run_order(*(ctypes.c_void_p(x.data_ptr()) for x in (cu, order, first)), n)
        assert torch.equal(order.long(), torch.argsort(sizes, descending=True, stable=True))
        tiles = (sizes[order.long()] + 127) // 128
        assert first.tolist() == [0, *tiles.cumsum(0).tolist()]


@pytest.mark.parametrize(("name", "count"), [("fwd", 6), ("bwd", 12)])
def test_what_it_compiles_to(name, count):
    kernels, log = cuda_sass.compiled("global_attention_sm90.cu")
    attention = {k: v for k, v in kernels.items() if k.startswith(f"global_attention_{name}_sm90<")}
    assert len(attention) == count
    cuda_sass.check_hopper(attention, log, producer=True)


def test_weights_are_made_beside_the_products():
    """Between the wait for the scores and the wait for the outputs: the 64 exponentials of a thread
    (64 queries x 128 keys a warpgroup)."""
    kernels, _ = cuda_sass.compiled("global_attention_sm90.cu")
    for kernel in kernels.values():
        if kernel.name.startswith("global_attention_fwd_sm90<"):
            code = [text for _, text in kernel.code]
            waits = [i for i, text in enumerate(code) if "WARPGROUP.DEPBAR" in text]
            (scores,) = (i for i in waits if "gsb0, 0x1" in code[i])
            outputs = next(i for i in waits if i > scores)
            beside = sum("MUFU.EX2" in text for text in code[scores:outputs])
            assert beside >= 64, f"{kernel.name}: {beside}"
