"""The CUDA kernels of token_score, run on the CPU from their own sources, against the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import cuda_model
import pytest
import torch
from cuda_model import DTYPES, f32, i32, i64, pointer, poisoned, u32

from fastenc import testing
from fastenc.ops import _token_ref as ref


class TokenArgs(ctypes.Structure):
    _fields_ = [
        ("token", pointer), ("token_factor", pointer), ("label", pointer),
        ("label_factor", pointer), ("weight", pointer), ("out_weight", pointer),
        ("out_bias", pointer),
        ("token_stride", i64), ("token_factor_stride", i64), ("weight_stride", i64),
        ("label_seq_stride", i64), ("label_stride", i64),
        ("label_factor_seq_stride", i64), ("label_factor_stride", i64),
        ("cu_words", pointer), ("num_seqs", i32), ("labels", i32), ("size", i32),
        ("factors", i32), ("words", i64), ("seed", pointer), ("drop_below", u32),
        ("keep_scale", f32),
    ]  # fmt: skip


class TokenPass(ctypes.Structure):
    _fields_ = [("first", i32), ("last", i32), ("dhidden", pointer), ("dfactors", pointer)]


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    size: int = 144
    factors: int = 72
    labels: int = 5
    dropout_p: float = 0.0
    bias: bool = True
    shared: bool = False  # one label set for all sequences
    strided: bool = False  # rows are parts of wider ones
    passes: int = 1


CASES = [
    Case((9, 0, 1, 20)),
    Case((8, 3), size=40, factors=16, labels=40, dropout_p=0.3, shared=True, passes=3),
    Case((2, 1), size=264, factors=136, labels=130, dropout_p=0.2, bias=False, strided=True),
    Case((5, 2), size=33, factors=7, labels=1, dropout_p=0.1),
    Case((0, 31, 0), size=130, factors=65, labels=9, strided=True, passes=2),
]
RUNS = [
    pytest.param(case, dtype, marks=() if dtype != torch.float16 or i == 0 else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for dtype in DTYPES
]
NAMES = ("token", "label", "token_factor", "label_factor", "weight", "out_weight", "out_bias")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    library = cuda_model.compile_model("tokens", tmp_path_factory.mktemp("model"))
    for name in ("args_size", "chunks_of", "parts_of", "pass_of"):
        function = getattr(library, name)
        function.restype, function.argtypes = (
            i64,
            [i64] * {"args_size": 0, "pass_of": 3}.get(name, 1),
        )
    assert library.args_size() == ctypes.sizeof(TokenArgs)
    return library


class Problem:
    def __init__(self, case: Case, dtype: torch.dtype):
        g = torch.Generator().manual_seed(3)
        words, seqs = sum(case.lengths), len(case.lengths)
        sets, wider = 1 if case.shared else seqs, 8 if case.strided else 0

        def lattice(limit, unit, *shape):
            """Hidden sums are odd eighths: no rounding takes one across the kink of the ReLU."""
            *most, last = shape
            steps = torch.randint(-limit, limit + 1, (*most, last + wider), generator=g)
            return (steps * unit).to(dtype)[..., :last]

        self.case, self.dtype = case, dtype
        self.token = lattice(15, 1 / 4, words, case.size) + 1 / 8
        self.label = lattice(8, 1 / 4, sets, case.labels, case.size).expand(seqs, -1, -1)
        self.token_factor = lattice(2, 1, words, case.factors)
        self.label_factor = lattice(3, 1 / 2, sets, case.labels, case.factors).expand(seqs, -1, -1)
        self.weight = lattice(2, 1 / 2, case.size, case.factors)
        self.out_weight = torch.randn(3, case.size, generator=g).to(dtype)
        self.out_bias = torch.randn(3, generator=g).to(dtype) if case.bias else None
        self.grad = torch.randn(words, case.labels, 3, generator=g).to(dtype)
        self.cu = testing.cu_seqlens_of(case.lengths)
        self.seed = torch.tensor([2**35 + 5]) if case.dropout_p else None
        item = self.token.element_size()
        self.vectors = int(case.size * item % 16 == 0 and case.factors * item % 16 == 0)

    def args(self) -> TokenArgs:
        case = self.case
        return TokenArgs(
            *(None if x is None else x.data_ptr() for x in (
                self.token, self.token_factor, self.label, self.label_factor, self.weight,
                self.out_weight, self.out_bias)),
            self.token.stride(0), self.token_factor.stride(0), self.weight.stride(0),
            *self.label.stride()[:2], *self.label_factor.stride()[:2],
            self.cu.data_ptr(), len(case.lengths), case.labels, case.size, case.factors,
            len(self.token), None if self.seed is None else self.seed.data_ptr(),
            int(case.dropout_p * 2**32), 1 / (1 - case.dropout_p),
        )  # fmt: skip

    def inputs(self, dtype):
        tensors = (self.token, self.label, self.token_factor, self.label_factor, self.weight,
                   self.out_weight)  # fmt: skip
        return [x.to(dtype) for x in tensors]

    def options(self, dtype):
        bias = None if self.out_bias is None else self.out_bias.to(dtype)
        return bias, self.case.dropout_p, self.seed


def address(x: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(model, case, dtype):
    p = Problem(case, dtype)
    words, results = len(p.token), []
    for split, backwards in ((False, 0), (False, 1), (True, 0)):
        out = poisoned(words, case.labels, 3, dtype=dtype)
        parts = poisoned(
            model.chunks_of(case.size), words * case.labels, 3, dtype=torch.float32
        ) if split else None  # fmt: skip
        model.score_fwd(
            DTYPES[dtype], p.vectors, ctypes.byref(p.args()), address(out), address(parts),
            backwards,
        )  # fmt: skip
        results.append(out)
    exact, plain = (
        ref.token_score_ref(*p.inputs(kind), p.cu, *p.options(kind))
        for kind in (torch.float64, dtype)
    )
    testing.assert_parity("out", results[0], plain, exact)
    assert torch.equal(results[0], results[1]), "depends on the warps' order"
    assert torch.equal(results[0], results[2]), "depends on how columns are shared out"


def backward(model, p: Problem, passes: int, backwards: int = 0) -> list[torch.Tensor]:
    case, dtype = p.case, p.dtype
    words, seqs = len(p.token), len(case.lengths)
    step = -(-words // passes)
    dtoken, dtoken_factor = (poisoned(words, n, dtype=dtype) for n in (case.size, case.factors))
    dlabel, dlabel_factor, dweight, sums = (
        torch.zeros(shape)
        for shape in (
            (seqs, case.labels, case.size), (seqs, case.labels, case.factors),
            (case.size, case.factors), (3, case.size + 1),
        )
    )  # fmt: skip
    for first in range(0, words, step):
        last = min(first + step, words)
        pairs = (last - first) * case.labels
        dhidden = poisoned(pairs, case.size, dtype=dtype)
        dfactors = poisoned(pairs, case.factors, dtype=torch.float32)
        parts = poisoned(model.parts_of(pairs), 3, case.size + 1, dtype=torch.float32)
        part = TokenPass(first, last, dhidden.data_ptr(), dfactors.data_ptr())
        model.score_bwd(
            DTYPES[dtype], p.vectors, ctypes.byref(p.args()), ctypes.byref(part),
            *map(address, (p.grad, parts, dtoken, dlabel, dtoken_factor, dlabel_factor, dweight,
                           sums)), backwards,
        )  # fmt: skip
    grads = (dtoken, dlabel, dtoken_factor, dlabel_factor, dweight, sums[:, :-1], sums[:, -1])
    return [x.to(dtype) for x in grads]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_backward(model, case, dtype):
    p = Problem(case, dtype)
    runs = [backward(model, p, case.passes, backwards) for backwards in (0, 1)]
    exact = ref.token_backward(
        p.grad.double(), *p.inputs(torch.float64), p.cu, case.dropout_p, p.seed
    )
    largest = max(float(x.abs().max()) for x in exact)
    # Plain PyTorch at the same dtype: autograd of the specification.
    leaves = [x.clone().requires_grad_() for x in p.inputs(dtype)]
    out = ref.token_score_ref(*leaves, p.cu, None, case.dropout_p, p.seed)
    plain = [*torch.autograd.grad(out, leaves, p.grad), p.grad.sum((0, 1))]
    for name, a, b, c in zip(NAMES, runs[0], plain, exact, strict=True):
        testing.assert_parity(f"d{name}", a, b, c, cancelled=largest)
    assert all(map(torch.equal, *runs)), "depends on the warps' order"


def test_where_a_pass_ends_does_not_show(model):
    p = Problem(CASES[0], torch.float32)
    once, often = (backward(model, p, passes) for passes in (1, 7))
    for name, a, b in list(zip(NAMES, once, often, strict=True))[:4]:
        assert torch.equal(a, b), f"d{name}"


def test_a_sequence_does_not_see_its_neighbours(model):
    """Sequences between NaN neighbours score, and get gradients, as they do alone."""
    p = Problem(Case((4, 9, 3), labels=15, dropout_p=0.2), torch.bfloat16)
    own, clean = slice(4, 13), None
    for poison in (False, True):
        if poison:
            for x in (p.token, p.token_factor, p.grad):
                x[:4], x[13:] = float("nan"), float("nan")
        out = poisoned(16, 15, 3, dtype=torch.bfloat16)
        args = ctypes.byref(p.args())
        model.score_fwd(1, p.vectors, args, address(out), address(None), 0)
        grads = backward(model, p, 1)
        seen = [out[own], grads[0][own], grads[1][1], grads[2][own], grads[3][1]]
        if poison:
            assert all(map(torch.equal, seen, clean))
        clean = [x.clone() for x in seen]


def test_passes_fit_their_workspace(model):
    for words, labels, size in ((384, 25, 2048), (384, 1000, 2048), (3, 100_000, 3072), (5, 1, 0)):
        step = model.pass_of(words, labels, size)
        assert 1 <= step <= words
        assert step == 1 or step * labels * size <= 2**24
        assert step == words or (step + 1) * labels * size > 2**24
