"""The CUDA kernels of disentangled attention, run on the CPU from their own sources."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import cuda_model
import pytest
import torch
from cuda_model import DTYPES, HeadRows, attention_args, i32, pointer

from fastenc import testing
from fastenc.ops import _disentangled_ref as ref


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    head_dim: int = 64
    terms: str = "both"
    buckets: int = 8
    max_positions: int = 12
    heads: int = 1
    dropout_p: float = 0.0
    packed: bool = True  # q, k, v as views of one tensor, tables with the heads last
    scale: float | None = None


CASES = [
    Case((70, 0, 1, 129), heads=2),
    Case((200, 65), buckets=32, max_positions=80, dropout_p=0.3, packed=False),
    Case((130, 2), terms="c2p", dropout_p=0.1),
    Case((64, 63), terms="p2c", buckets=256, max_positions=512),
    Case((1,), heads=3),
    Case((75,), head_dim=32, heads=2, max_positions=0),
    Case((90, 5), head_dim=96, buckets=16, max_positions=40),
    Case((100,), head_dim=128, dropout_p=0.2, heads=2),
    Case((97,), head_dim=128, terms="p2c", scale=-0.1),
    Case((33, 66), head_dim=10, terms="both"),
    Case((67,), head_dim=127, terms="c2p", packed=False),
    Case((70,), terms="none"),
]

RUNS = [
    pytest.param(case, dtype, marks=() if dtype != torch.float16 or i < 2 else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for dtype in DTYPES
]


class PositionArgs(ctypes.Structure):
    _fields_ = [("key", HeadRows), ("query", HeadRows), ("index", pointer),
                ("radius", i32), ("size", i32)]  # fmt: skip


class DisentangledArgs(ctypes.Structure):
    _fields_ = [("attention", cuda_model.AttentionArgs), ("positions", PositionArgs)]


class DistanceRows(ctypes.Structure):
    _fields_ = [("reach", i32), ("far", i32)]


class DisentangledGradArgs(ctypes.Structure):
    _fields_ = [("grads", cuda_model.AttentionGradArgs), ("positions", PositionArgs),
                ("key_partials", pointer), ("query_partials", pointer),
                ("rows", DistanceRows), ("splits", i32), ("slots", i32)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    library = cuda_model.compile_model("disentangled", tmp_path_factory.mktemp("model"))
    for name in ("args_size", "grad_args_size", "bank_conflicts"):
        getattr(library, name).restype = ctypes.c_int64
    assert library.args_size() == ctypes.sizeof(DisentangledArgs)
    assert library.grad_args_size() == ctypes.sizeof(DisentangledGradArgs)
    return library


def table_rows(x: torch.Tensor | None) -> HeadRows:
    return HeadRows() if x is None else HeadRows(x.data_ptr(), x.stride(1), x.stride(0))


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

        parts = normal(total, 3, *shape).unbind(1)
        self.q, self.k, self.v = parts if case.packed else (x.clone() for x in parts)
        self.grad = normal(total, *shape)
        rows = 2 * case.buckets
        tables = [normal(rows, *shape).transpose(0, 1) for _ in range(2)]
        if not case.packed:
            tables = [x.contiguous() for x in tables]
        self.key = tables[0] if case.terms in ("both", "c2p") else None
        self.query = tables[1] if case.terms in ("both", "p2c") else None
        self.index = ref.relative_index(case.buckets, case.max_positions)
        self.cu = testing.cu_seqlens_of(case.lengths)
        self.seed = torch.tensor([2**40 + 17]) if case.dropout_p else None
        terms = 1 + (self.key is not None) + (self.query is not None)
        self.scale = (case.head_dim * terms) ** -0.5 if case.scale is None else case.scale

    def reference(self, dtype):
        """out, lse and the gradients of q, k, v and the tables by autograd at ``dtype``."""
        leaves = [
            None if x is None else x.to(dtype).requires_grad_()
            for x in (self.q, self.k, self.v, self.key, self.query)
        ]
        out, lse = ref.disentangled_attention_ref(
            *leaves, self.index, self.cu, self.scale, self.case.dropout_p, self.seed
        )
        given = [x for x in leaves if x is not None]
        grads = torch.autograd.grad((out * self.grad.to(dtype)).sum(), given)
        return [out.detach(), lse.detach(), *grads]

    def args(self):
        args, out, lse = attention_args(
            self.q, self.k, self.v, self.cu, (-1, -1), self.scale, self.case.dropout_p, self.seed
        )
        tables = [x for x in (self.key, self.query) if x is not None]
        args.vectors &= cuda_model.aligned(*tables)
        positions = PositionArgs(
            table_rows(self.key), table_rows(self.query), self.index.data_ptr(),
            self.index.numel() // 2, 2 * self.case.buckets,
        )  # fmt: skip
        return DisentangledArgs(args, positions), out, lse


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(model, case, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)
    args, out, lse = problem.args()
    before = model.bank_conflicts()
    model.disentangled_fwd(DTYPES[dtype], ctypes.byref(args), 0)
    testing.assert_parity("out", out, plain[0], exact[0])
    assert testing.max_error(lse, exact[1]) <= 2e-5
    assert model.bank_conflicts() == before

    args, again, lse_again = problem.args()
    model.disentangled_fwd(DTYPES[dtype], ctypes.byref(args), 1)  # the last warp first
    assert torch.equal(out, again) and torch.equal(lse, lse_again), "depends on the warps' order"


def gradients(model, problem: Problem, backwards: int, splits: int) -> list[torch.Tensor]:
    """dq, dk, dv and those of the tables that are given, from the forward of the kernels."""
    case, dtype = problem.case, problem.dtype
    args, out, _lse = problem.args()
    model.disentangled_fwd(DTYPES[dtype], ctypes.byref(args), backwards)
    total, heads, head_dim = out.shape
    grads = [cuda_model.poisoned(total, heads, head_dim, dtype=dtype) for _ in range(3)]
    args.attention.vectors &= cuda_model.aligned(problem.grad, *grads)
    delta = cuda_model.poisoned(heads, total, dtype=torch.float32)
    found = (i32 * 3)()
    longest = max(case.lengths)
    model.distance_rows_of(ctypes.c_int64(args.positions.radius), ctypes.c_int64(longest), found)
    *rows, count = found
    width = 64 if head_dim <= 64 else 128
    tables = [
        None if x is None else cuda_model.poisoned(*x.shape, dtype=dtype)
        for x in (problem.key, problem.query)
    ]
    partials = [None if x is None else torch.zeros(splits, heads, count, width) for x in tables]
    plain = cuda_model.AttentionGradArgs(
        args.attention, *map(HeadRows.of, (problem.grad, *grads)), None, delta.data_ptr(), None,
        problem.scale,
    )  # fmt: skip
    call = DisentangledGradArgs(
        plain, args.positions, *(None if x is None else x.data_ptr() for x in partials),
        DistanceRows(*rows), splits, total // 64 + len(case.lengths),
    )  # fmt: skip
    model.disentangled_bwd(
        DTYPES[dtype], ctypes.byref(call),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tables), backwards,
    )  # fmt: skip
    return [*grads, *(x for x in tables if x is not None)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(model, case, dtype):
    problem = Problem(case, dtype)
    exact, plain = problem.reference(torch.float64), problem.reference(dtype)[2:]
    largest = max(float(x.abs().max()) for x in exact)
    exact = exact[2:]
    before = model.bank_conflicts()
    actual = gradients(model, problem, 0, splits=2)
    names = ["dq", "dk", "dv"]
    names += ["dpos_key"] * (problem.key is not None) + ["dpos_query"] * (problem.query is not None)
    for name, a, b, c in zip(names, actual, plain, exact, strict=True):
        testing.assert_parity(name, a, b.to(a.dtype), c, cancelled=largest)
    assert model.bank_conflicts() == before
    again = gradients(model, problem, 1, splits=2)
    assert all(map(torch.equal, actual, again)), "depends on the warps' order"
