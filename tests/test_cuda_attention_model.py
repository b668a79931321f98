"""The CUDA attention kernels, run on the CPU from their own sources, against the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import cuda_model
import pytest
import torch
from cuda_model import DTYPES, attention_args

from fastenc import testing
from fastenc.ops import _attention_ref as ref


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    head_dim: int = 64
    window: tuple[int, int] = (-1, -1)
    heads: int = 1
    dropout_p: float = 0.0
    radius: int = 0  # of a relative bias
    rope: bool = False
    packed: bool = True  # q, k, v as views of one tensor
    scale: float | None = None


CASES = [
    Case((70, 0, 1, 129), window=(64, 64), heads=2, rope=True),
    Case((130, 65), rope=True, packed=False),
    Case((64, 63, 2), window=(5, 0), dropout_p=0.3),
    Case((140,), head_dim=32, radius=3, window=(70, 1), heads=2),
    Case((90,), head_dim=32, radius=20, dropout_p=0.1, heads=2),
    Case((75,), head_dim=96, rope=True, window=(0, 0)),
    Case((67, 5), head_dim=128, window=(-1, 9), scale=-0.1),
    Case((67,), head_dim=8, rope=True, dropout_p=0.2),
    Case((33, 40), head_dim=10, rope=True, window=(3, 30)),
    Case((66,), head_dim=127, packed=False),
]

RUNS = [
    pytest.param(case, dtype, marks=() if dtype != torch.float16 or i < 2 else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for dtype in DTYPES
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    library = cuda_model.compile_model("attention", tmp_path_factory.mktemp("model"))
    for name in ("args_size", "grad_args_size", "bank_conflicts"):
        getattr(library, name).restype = ctypes.c_int64
    assert library.args_size() == ctypes.sizeof(cuda_model.AttentionArgs)
    assert library.grad_args_size() == ctypes.sizeof(cuda_model.AttentionGradArgs)
    return library


@dataclass
class Problem:
    """Inputs of one case at one dtype, and what plain PyTorch makes of them."""

    case: Case
    dtype: torch.dtype

    def __post_init__(self):
        case, g = self.case, torch.Generator().manual_seed(7)
        total, shape = sum(case.lengths), (case.heads, case.head_dim)

        def normal(*size):
            return torch.randn(*size, generator=g).to(self.dtype)

        qkv = normal(total, 3, *shape)
        parts = qkv.unbind(1)
        self.q, self.k, self.v = parts if case.packed else (x.clone() for x in parts)
        self.grad, self.grad_lse = normal(total, *shape), torch.randn(case.heads, total)
        self.cu = testing.cu_seqlens_of(case.lengths)
        self.seed = torch.tensor([2**40 + 17]) if case.dropout_p else None
        self.table = torch.randn(case.heads, 2 * case.radius + 1) if case.radius else None
        self.cos = self.sin = None
        if case.rope:
            angle = torch.randn(max(case.lengths), case.head_dim // 2, generator=g)
            self.cos, self.sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        self.scale = case.head_dim**-0.5 if case.scale is None else case.scale

    def reference(self, dtype):
        """out, lse and the gradients of q, k, v, table by autograd at ``dtype``."""
        table = None if self.table is None else self.table.double().requires_grad_()
        x = torch.stack([self.q, self.k, self.v], 1).to(dtype).requires_grad_()
        options = (self.cu, self.case.window, self.scale, self.case.dropout_p, self.seed)
        if self.case.rope:
            out, lse = ref.rope_varlen_attention_ref(
                x, self.cos.to(dtype), self.sin.to(dtype), *options
            )
        else:
            out, lse = ref.varlen_attention_ref(*x.unbind(1), *options, table)
        loss = (out * self.grad.to(dtype)).sum() + (lse * self.grad_lse).sum()
        leaves = [x] if table is None else [x, table]
        dx, *dtable = torch.autograd.grad(loss, leaves)
        return [out.detach(), lse.detach(), *dx.unbind(1), *dtable]

    def args(self):
        return attention_args(
            self.q, self.k, self.v, self.cu, self.case.window, self.scale,
            self.case.dropout_p, self.seed, self.table, self.cos, self.sin,
        )  # fmt: skip


NAMES = ("out", "lse", "dq", "dk", "dv", "dtable")


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(model, case, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)
    args, out, lse = problem.args()
    before = model.bank_conflicts()
    model.attention_fwd(DTYPES[dtype], ctypes.byref(args), 0)
    testing.assert_parity("out", out, plain[0], exact[0])
    allowed = 2 * testing.max_error(plain[1], exact[1]) if case.rope else 0.0  # q and k are rounded
    assert testing.max_error(lse, exact[1]) <= allowed + 2e-5
    assert model.bank_conflicts() == before

    args, again, lse_again = problem.args()
    model.attention_fwd(DTYPES[dtype], ctypes.byref(args), 1)  # the last warp first
    assert torch.equal(out, again) and torch.equal(lse, lse_again), "depends on the warps' order"


def gradients(model, problem: Problem, backwards: int) -> list[torch.Tensor]:
    """dq, dk, dv and dtable of the kernels, from the forward of the kernels."""
    case, dtype = problem.case, problem.dtype
    args, out, _lse = problem.args()
    model.attention_fwd(DTYPES[dtype], ctypes.byref(args), backwards)
    total, heads, head_dim = out.shape
    if case.packed:
        grads = list(cuda_model.poisoned(total, 3, heads, head_dim, dtype=dtype).unbind(1))
    else:
        grads = [cuda_model.poisoned(total, heads, head_dim, dtype=dtype) for _ in range(3)]
    args.vectors &= cuda_model.aligned(problem.grad, *grads)
    delta = cuda_model.poisoned(heads, total, dtype=torch.float32)
    slots, entries = total // 64 + len(case.lengths), heads * (2 * case.radius + 1)
    partials = cuda_model.poisoned(slots, entries, dtype=torch.float32)
    call = cuda_model.AttentionGradArgs(
        args, *map(cuda_model.HeadRows.of, (problem.grad, *grads)),
        problem.grad_lse.data_ptr(), delta.data_ptr(),
        partials.data_ptr() if case.radius else None, problem.scale,
    )  # fmt: skip
    model.attention_bwd(DTYPES[dtype], ctypes.byref(call), backwards)
    if case.radius:
        dtable = torch.full_like(problem.table, float("nan"))
        model.bias_grad(
            ctypes.c_void_p(partials.data_ptr()), ctypes.c_void_p(dtable.data_ptr()),
            ctypes.c_int64(slots), ctypes.c_int64(entries),
        )  # fmt: skip
        grads.append(dtable)
    return grads


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(model, case, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)[2:]
    largest = max(float(x.abs().max()) for x in exact)
    exact = exact[2:]
    before = model.bank_conflicts()
    actual = gradients(model, problem, 0)
    for name, a, b, c in zip(("dq", "dk", "dv", "dtable"), actual, plain, exact, strict=False):
        testing.assert_parity(name, a, b.to(a.dtype), c, cancelled=largest)
    assert len(actual) == len(exact) and model.bank_conflicts() == before
    again = gradients(model, problem, 1)
    assert all(map(torch.equal, actual, again)), "depends on the warps' order"
