"""The CUDA span kernels, run on the CPU from their own sources, against the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import cuda_model
import pytest
import torch
from cuda_model import DTYPES, f32, i32, i64, pointer, poisoned, u32

from fastenc import testing
from fastenc.ops import _span_ref as ref


class SpanArgs(ctypes.Structure):
    _fields_ = [
        ("start", pointer), ("end", pointer), ("labels", pointer), ("label_bias", pointer),
        ("label_seq_stride", i64), ("label_stride", i64), ("cu_words", pointer),
        ("num_seqs", i32), ("size", i32), ("max_width", i32), ("label_count", i32),
        ("words", i64), ("seed", pointer), ("drop_below", u32), ("keep_scale", f32),
    ]  # fmt: skip


class Candidates(ctypes.Structure):
    _fields_ = [
        ("counts", pointer), ("word", pointer), ("width", pointer), ("label", pointer),
        ("score", pointer), ("threshold", f32),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    max_width: int = 12
    size: int = 128
    labels: int = 5
    dropout_p: float = 0.0
    bias: bool = True
    shared: bool = False  # one label set for all sequences


CASES = [
    Case((9, 0, 1, 14)),
    Case((8, 3), size=72, labels=40, dropout_p=0.3, shared=True),
    Case((6,), max_width=70, size=64, labels=70, bias=False),
    Case((5, 2), max_width=3, size=33, labels=1, dropout_p=0.1),
]
RUNS = [
    pytest.param(case, dtype, marks=() if dtype != torch.float16 or i == 0 else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for dtype in DTYPES
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    library = cuda_model.compile_model("spans", tmp_path_factory.mktemp("model"))
    library.args_size.restype = library.candidates_fwd.restype = i64
    assert library.args_size() == ctypes.sizeof(SpanArgs)
    return library


class Problem:
    def __init__(self, case: Case, dtype: torch.dtype):
        g = torch.Generator().manual_seed(3)
        words, seqs = sum(case.lengths), len(case.lengths)

        def normal(*size):
            return torch.randn(*size, generator=g).to(dtype)

        self.case, self.dtype = case, dtype
        self.start, self.end = normal(words, case.size), normal(words, case.size)
        sets = 1 if case.shared else seqs
        self.labels = normal(sets, case.labels, case.size).expand(seqs, -1, -1)
        self.bias = normal(seqs, case.labels) if case.bias else None
        self.grad = normal(words, case.max_width, case.labels)
        self.cu = testing.cu_seqlens_of(case.lengths)
        self.seed = torch.tensor([2**35 + 5]) if case.dropout_p else None
        self.vectors = int(case.size * self.start.element_size() % 16 == 0)

    def args(self) -> SpanArgs:
        case = self.case
        return SpanArgs(
            self.start.data_ptr(), self.end.data_ptr(), self.labels.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.labels.stride(0), self.labels.stride(1), self.cu.data_ptr(),
            len(case.lengths), case.size, case.max_width, case.labels, len(self.start),
            None if self.seed is None else self.seed.data_ptr(),
            int(case.dropout_p * 2**32), 1 / (1 - case.dropout_p),
        )  # fmt: skip

    def inputs(self, dtype, dropout=True):
        bias = None if self.bias is None else self.bias.to(dtype)
        given = [x.to(dtype) for x in (self.start, self.end, self.labels)]
        options = (self.case.dropout_p, self.seed) if dropout else ()
        return given, (self.cu, self.case.max_width, bias, *options)


def address(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def finite(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x == float("-inf"), 0.0)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_score_forward(model, case, dtype):
    p = Problem(case, dtype)
    results = []
    for columns, backwards in ((32, 0), (64, 1)):
        out = poisoned(len(p.start), case.max_width, case.labels, dtype=dtype)
        model.score_fwd(
            DTYPES[dtype], p.vectors, columns, ctypes.byref(p.args()), address(out), backwards
        )
        results.append(out)
    exact, plain = (
        ref.span_score_ref(*given, *rest)
        for given, rest in (p.inputs(torch.float64), p.inputs(dtype))
    )
    assert torch.equal(results[0] == float("-inf"), exact == float("-inf"))
    testing.assert_parity("out", finite(results[0]), finite(plain), finite(exact))
    assert torch.equal(*results)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_score_backward(model, case, dtype):
    p = Problem(case, dtype)
    shapes = (p.start.shape, p.end.shape, p.labels.shape, p.labels.shape[:2])
    runs = []
    for backwards in (0, 1):
        grads = [poisoned(*shape, dtype=dtype) for shape in shapes]
        model.score_bwd(
            DTYPES[dtype], p.vectors, ctypes.byref(p.args()), address(p.grad),
            *map(address, grads), backwards,
        )  # fmt: skip
        runs.append(grads)

    def reference(kind):
        given, (cu, width, _, *dropout) = p.inputs(kind)
        return ref.score_backward(p.grad.to(kind), *given, cu, width, *dropout)

    exact = reference(torch.float64)
    largest = max(float(x.abs().max()) for x in exact)
    # Plain PyTorch at the same dtype: autograd of the specification.
    given, rest = p.inputs(dtype)
    leaves = [x.clone().requires_grad_() for x in given]
    out = ref.span_score_ref(*leaves, *rest)
    seen = out.isfinite()
    plain = torch.autograd.grad((out[seen] * p.grad[seen]).sum(), leaves)
    for name, a, b, c in zip(("dstart", "dend", "dlabels"), runs[0], plain, exact, strict=False):
        testing.assert_parity(name, a, b, c, cancelled=largest)
    torch.testing.assert_close(runs[0][3], exact[3].to(dtype))
    assert all(map(torch.equal, *runs)), "depends on the warps' order"


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_candidates(model, case, dtype):
    p = Problem(case, dtype)
    args = p.args()
    args.drop_below, args.keep_scale = 0, 1.0
    rows = len(p.start) * case.max_width
    counts = torch.full((rows,), -1, dtype=torch.int32)
    request = Candidates(counts.data_ptr(), None, None, None, None, 0.7)
    call = (DTYPES[dtype], p.vectors, ctypes.byref(args), ctypes.byref(request))
    total = model.candidates_fwd(*call)
    found = [torch.full((total,), -1, dtype=torch.int64) for _ in range(3)]
    score = poisoned(total, dtype=torch.float32)
    request.word, request.width, request.label = (x.data_ptr() for x in found)
    request.score = score.data_ptr()
    model.candidates_fwd(*call)
    given, rest = p.inputs(torch.float64, dropout=False)
    sure = torch.sigmoid(ref.span_score_ref(*given, *rest))
    # A probability within rounding of the threshold may fall on either side.
    slack = 1e-5 if dtype == torch.float32 else 0.05
    got = set(zip(*(x.tolist() for x in found), strict=True))
    assert len(got) == total and list(zip(*(x.tolist() for x in found), strict=True)) == sorted(got)
    must, may = (set(map(tuple, (sure > 0.7 + d).nonzero().tolist())) for d in (slack, -slack))
    assert must <= got <= may and total > 0
    assert testing.max_error(score, sure[tuple(found)]) <= slack


@pytest.mark.parametrize(("case", "dtype"), RUNS[:1] + RUNS[1:2] + RUNS[9:10], ids=str)
def test_pool(model, case, dtype):
    p = Problem(case, dtype)
    out = poisoned(len(p.start), case.max_width, case.size, dtype=dtype)
    model.pool_fwd(DTYPES[dtype], p.vectors, ctypes.byref(p.args()), address(out))
    expected = ref.pool_forward(p.start, p.end, p.cu, case.max_width)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape).to(dtype)
    grads = [poisoned(*p.start.shape, dtype=dtype) for _ in range(2)]
    model.pool_bwd(
        DTYPES[dtype], p.vectors, ctypes.byref(p.args()), address(grad), *map(address, grads)
    )
    for actual, wanted in zip(
        grads, ref.pool_backward(grad, p.start, p.end, p.cu, case.max_width), strict=True
    ):
        torch.testing.assert_close(actual, wanted)
