"""Windowed attention for Hopper without a GPU: its code run on the CPU, and what it compiles to."""

from __future__ import annotations

import ctypes

import cuda_model
import cuda_sass
import pytest
import torch
from cuda_model import DTYPES
from test_cuda_attention_model import Case, Problem

from fastenc import testing

# (case, reach of the kernel, heads a block walks)
CASES = [
    (Case((70, 0, 1, 193), heads=3, window=(64, 64), rope=True), 64, 2),
    (Case((200, 5), heads=1, window=(3, 64), packed=False), 64, 1),
    (Case((130,), head_dim=32, heads=2, window=(64, 0), rope=True), 64, 2),
    (Case((150,), head_dim=128, heads=2, window=(64, 20), rope=True, scale=0.3), 64, 2),
    (Case((260,), window=(128, 128), rope=True), 128, 1),
    (Case((140, 60), head_dim=32, heads=1, window=(100, 1)), 128, 1),
    (Case((65,), heads=1, window=(0, 0), rope=True), 64, 1),
    (Case((60, 33), heads=2, window=(-1, -1), rope=True), 64, 1),
]
RUNS = [(*c, torch.bfloat16) for c in CASES] + [(*CASES[1], torch.float16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    library = cuda_model.compile_model("local_attention_sm90", tmp_path_factory.mktemp("model"))
    library.args_size.restype = ctypes.c_int64
    library.grad_args_size.restype = ctypes.c_int64
    assert library.args_size() == ctypes.sizeof(cuda_model.AttentionArgs)
    assert library.grad_args_size() == ctypes.sizeof(cuda_model.AttentionGradArgs)
    return library


def run(model, problem, reach, heads_per_block, late=1, backwards=0):
    """``late``: asynchronous copies and products happen when waited for, else at once."""
    args, out, lse = problem.args()
    served = model.run_local_fwd(
        ctypes.byref(args), DTYPES[problem.dtype], reach, heads_per_block, late, backwards
    )
    assert served
    return out, lse


@pytest.mark.parametrize(("case", "reach", "heads_per_block", "dtype"), RUNS, ids=str)
def test_forward(model, case, reach, heads_per_block, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)
    out, lse = run(model, problem, reach, heads_per_block)
    testing.assert_parity("out", out, plain[0], exact[0])
    allowed = 2 * testing.max_error(plain[1], exact[1]) if case.rope else 0.0  # q and k are rounded
    assert testing.max_error(lse, exact[1]) <= allowed + 2e-5
    again = run(model, problem, reach, heads_per_block, late=0, backwards=1)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), "depends on the order"


def gradients(model, problem, reach, heads_per_block, late=1, backwards=0):
    """dq, dk, dv of the kernels from the kernels' own forward. ``reach``: of the backward kernel
    that holds a tile and its halo at once, or STREAM for the one that does not."""
    args, out, lse = problem.args()
    how = (heads_per_block, late, backwards)
    dtype = DTYPES[problem.dtype]
    if not model.run_local_fwd(ctypes.byref(args), dtype, reach or 128, *how):
        for x, exact in zip((out, lse), problem.reference(torch.float64), strict=False):
            x.copy_(exact)
    total, heads, head_dim = out.shape
    grads = list(cuda_model.poisoned(total, 3, heads, head_dim, dtype=out.dtype).unbind(1))
    delta = cuda_model.poisoned(heads, total, dtype=torch.float32)
    call = cuda_model.AttentionGradArgs(
        args, *map(cuda_model.HeadRows.of, (problem.grad, *grads)),
        problem.grad_lse.data_ptr(), delta.data_ptr(), None, problem.scale,
    )  # fmt: skip
    if reach == STREAM:
        assert model.run_local_stream_bwd(ctypes.byref(call), dtype, *how)
    else:
        assert model.run_local_bwd(ctypes.byref(call), dtype, reach, *how)
    return grads


STREAM = 0
STREAM_CASES = [
    Case((260,), window=(128, 128), rope=True),
    Case((1, 0, 63, 64, 65, 2, 130), heads=4, window=(100, 3), rope=True, packed=False),
    Case((127, 128, 129), window=(0, 128)),
    Case((600,), window=(128, 65), rope=True, scale=0.3),  # blocks on both sides, and far ones
    Case((*[3] * 20, 0, 0), heads=2, window=(-1, -1), rope=True),
]
BACKWARD = [run for run in RUNS if run[0].head_dim * run[1] <= 64 * 64]
BACKWARD += [(case, STREAM, 3, torch.bfloat16) for case in STREAM_CASES]
BACKWARD += [(case, STREAM, 1, torch.float16) for case in STREAM_CASES[:2]]


@pytest.mark.parametrize(("case", "reach", "heads_per_block", "dtype"), BACKWARD, ids=str)
def test_backward(model, case, reach, heads_per_block, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)[2:]
    largest = max(float(x.abs().max()) for x in exact)
    actual = gradients(model, problem, reach, heads_per_block)
    for name, a, b, c in zip(("dq", "dk", "dv"), actual, plain, exact[2:], strict=True):
        testing.assert_parity(name, a, b, c, cancelled=largest)
    again = gradients(model, problem, reach, heads_per_block, late=0, backwards=1)
    assert all(map(torch.equal, actual, again)), "depends on the order"


def test_neighbours_do_not_leak(model):
    case = Case((70, 90, 40), heads=1, window=(64, 64), rope=True)
    problem = Problem(case, torch.bfloat16)
    out, lse = run(model, problem, 64, 1)
    for x in (problem.q, problem.k, problem.v):
        x[70:160] = float("nan")
    others = [*range(70), *range(160, 200)]
    poisoned, poisoned_lse = run(model, problem, 64, 1)
    assert torch.equal(out[others], poisoned[others])
    assert torch.equal(lse[:, others], poisoned_lse[:, others])
    assert poisoned[70:160].isnan().all()


@pytest.mark.parametrize(("reach", "window"), [(64, (64, 64)), (STREAM, (128, 128))])
def test_neighbours_do_not_leak_into_gradients(model, reach, window):
    problem = Problem(Case((70, 90, 40), heads=1, window=window, rope=True), torch.bfloat16)
    grads = gradients(model, problem, reach, 1)
    for x in (problem.q, problem.k, problem.v, problem.grad):
        x[70:160] = float("nan")
    others = [*range(70), *range(160, 200)]
    for before, after in zip(grads, gradients(model, problem, reach, 1), strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(("name", "count"), [("fwd", 10), ("bwd", 6), ("stream_bwd", 2)])
def test_what_it_compiles_to(name, count):
    kernels, log = cuda_sass.compiled("local_attention_sm90.cu")
    attention = {k: v for k, v in kernels.items() if k.startswith(f"local_attention_{name}_sm90<")}
    assert len(attention) == count
    cuda_sass.check_hopper(attention, log, producer=name == "stream_bwd")
