"""The CUDA row kernels, run on the CPU from their own sources, against the reference.

Forward and gradients go through the autograd rules of the ops. Every kernel runs twice, threads and
blocks in one order and in the other, with NaN in and around its outputs.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import cuda_rows
import pytest
import torch
from cuda_model import DTYPES, Parameter, i64
from cuda_rows import address, check, differentiable, outputs_of, surrounded
from torch import Tensor

from fastenc import testing
from fastenc.ops.geglu import ACTIVATIONS
from fastenc.ops.segment_pool import MODES

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cuda_rows.compile_rows(tmp_path_factory.mktemp("model"))


# ---- geglu ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gated:
    rows: int
    inner: int
    vectors: bool = True
    group: int = 0  # rows that the x of a grid covers at most, if not 0
    shift: int = 0  # elements by which addresses are off


GATED = [
    Gated(1, 1, vectors=False),
    Gated(37, 72),
    Gated(70, 8, group=16),
    Gated(5, 77, vectors=False, group=2),
    Gated(300, 16, vectors=False, shift=1),
    Gated(0, 8),
]


@every_dtype
@pytest.mark.parametrize("case", GATED, ids=str)
def test_geglu(model, case, dtype):
    def run(name, activation, shape, *given):
        placed = [surrounded(x, case.shift) for x in given]

        def call(out, order):
            return model[name](
                DTYPES[dtype], ACTIVATIONS.index(activation), *map(address, placed), out,
                case.rows, case.inner, case.group, order,
            )  # fmt: skip

        return outputs_of(call, (shape, dtype), vectors=case.vectors, shift=case.shift)[0]

    geglu = differentiable(
        "geglu",
        lambda x, activation: run("geglu_fwd", activation, (case.rows, case.inner), x),
        lambda grad, x, activation: run("geglu_bwd", activation, x.shape, grad, x),
    )
    x = torch.randn(case.rows, 2 * case.inner) * 2
    x[:1, ::5] *= 40  # where the activations saturate
    for activation in ACTIVATIONS:
        check("geglu", geglu, x.to(dtype), activation)


# ---- rope ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotated:
    shape: tuple[int, ...]  # (tokens, [n,] heads, head_dim)
    vectors: bool = True
    layout: str = "dense"  # or "packed": beside v; "odd": rows of head_dim + 1; "swapped"
    tables: torch.dtype | None = torch.float32
    lengths: tuple[int, ...] | None = None  # positions from cu_seqlens, else at random
    wide: bool = True
    group: int = 0


ROTATED = [
    Rotated((1, 1, 2), vectors=False, tables=None),
    Rotated((9, 2, 3, 32), layout="packed", wide=False),
    Rotated((9, 2, 3, 32), layout="packed", tables=None, lengths=(4, 0, 5), group=4),
    Rotated((29, 3, 7, 16), lengths=(29,), wide=False),
    Rotated((130, 5, 16), layout="swapped", tables=None),
    Rotated((11, 2, 3, 32), vectors=False, layout="odd", group=3),
    Rotated((7, 2, 3, 6), vectors=False, wide=False),
    Rotated((0, 2, 3, 16)),
]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "packed":
        return torch.cat([x, x[:, :1]], dim=1)[:, : x.shape[1]]
    if layout == "odd":
        return torch.cat([x, x[..., :1]], dim=-1)[..., :-1]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "swapped" else surrounded(x)


@every_dtype
@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_rope(model, case, dtype):
    tokens, *_, heads, head_dim = case.shape
    n = case.shape[1] if len(case.shape) == 4 else 1

    def rotate(x, cos, sin, positions, sign):
        x, cos, sin = laid_out(x, case.layout), surrounded(cos), surrounded(sin)
        strides = (i64 * 3)(x.stride(0), x.stride(1) if x.dim() == 4 else 0, x.stride(-2))

        def call(y, order):
            return model["rope"](
                DTYPES[dtype], DTYPES[cos.dtype], address(x), y, address(cos), address(sin),
                address(positions), positions.dtype == torch.int64, tokens, n, heads, head_dim,
                strides, sign, case.group, order,
            )  # fmt: skip

        return outputs_of(call, (x.shape, dtype), vectors=case.vectors)[0]

    def rope(*args):  # a name that tells check() that tables have no gradient
        return op(*args)

    op = differentiable("rope", lambda *args: rotate(*args, 1.0), lambda *args: rotate(*args, -1.0))
    x = torch.randn(case.shape).to(dtype)
    cos, sin = (t.to(case.tables or dtype) for t in testing.rope_tables(50, head_dim))
    positions = torch.randint(0, 50, (tokens,))
    if case.lengths:
        positions = torch.cat([torch.arange(length) for length in case.lengths])
    given = (cos, sin, positions if case.wide else positions.int())
    check("rope", rope, x, *given)
    back = rotate(rotate(x, *given, 1.0), *given, -1.0)
    torch.testing.assert_close(back, x, atol=8 * torch.finfo(dtype).eps, rtol=0)


# ---- add_layer_norm ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normed:
    rows: int
    hidden: int
    residual: bool = True
    bias: bool = True
    vectors: tuple[bool, bool] = (True, True)  # forward, backward
    sm_count: int = 1
    shift: int = 0


NORMED = [
    # A warp a row; the last block is not full.
    Normed(10, 64, sm_count=132),
    Normed(70, 48, residual=False, sm_count=5),
    Normed(19, 768, bias=False),
    Normed(6, 1024, residual=False, bias=False),
    # A block a row.
    Normed(3, 1032, sm_count=2),
    Normed(7, 1536, residual=False),
    Normed(3, 4104, bias=False),
    # Loops: no whole vectors, an odd address, too wide.
    Normed(1, 1, vectors=(False, False)),
    Normed(11, 17, vectors=(False, False), bias=False),
    Normed(10, 301, vectors=(False, False)),
    Normed(9, 64, vectors=(False, False), residual=False, shift=1),
    Normed(2, 8200, vectors=(True, False), bias=False),
    Normed(0, 8),
]


def pointer_to(x: Tensor | None):
    return ctypes.byref(Parameter.of(x))


def add_layer_norm(model, case: Normed) -> Callable:
    def forward(x, residual, weight, bias, eps):
        added = x if residual is None else residual
        total_dtype = torch.promote_types(x.dtype, added.dtype)
        placed = [surrounded(t, case.shift) for t in (x, residual)]
        parameters = [surrounded(t, case.shift) for t in (weight, bias)]

        def call(normed, mean, rstd, total, order):
            return model["add_layer_norm_fwd"](
                DTYPES[x.dtype], DTYPES[added.dtype], *map(address, placed),
                *map(pointer_to, parameters), normed, total if case.residual else None, mean, rstd,
                *x.shape, eps, order,
            )  # fmt: skip

        normed, mean, rstd, total = outputs_of(
            call, (x.shape, total_dtype), *[(x.shape[:-1], torch.float32)] * 2,
            (x.shape if case.residual else (0,), total_dtype),
            vectors=case.vectors[0], shift=case.shift, narrowest=min(x.itemsize, added.itemsize),
        )  # fmt: skip
        return normed, total, mean, rstd

    def backward(grad_normed, grad_total, total, weight, mean, rstd, has_bias):
        placed = [surrounded(t, case.shift) for t in (grad_normed, grad_total, total)]
        weight, stats = surrounded(weight, case.shift), [surrounded(t) for t in (mean, rstd)]

        def call(dx, dweight, dbias, order):
            return model["add_layer_norm_bwd"](
                DTYPES[total.dtype], *map(address, placed), pointer_to(weight),
                *map(address, stats), dx, dweight, dbias if has_bias else None, *total.shape,
                case.sm_count, order,
            )  # fmt: skip

        return outputs_of(
            call, (total.shape, total.dtype), (weight.shape, weight.dtype),
            (weight.shape if has_bias else (0,), weight.dtype),
            vectors=case.vectors[1], shift=case.shift,
        )  # fmt: skip

    op = differentiable("add_layer_norm", forward, backward)

    def fn(x, residual, weight, bias, eps=1e-5):
        normed, total, _, _ = op(x, residual, weight, bias, eps)
        return normed, x if residual is None else total

    fn.forward = forward
    return fn


def norm_arguments(case: Normed, x_dtype, residual_dtype, weight_dtype, bias_dtype):
    x, residual = torch.randn(2, case.rows, case.hidden) * 2 + 0.5
    weight, bias = torch.randn(case.hidden) * 0.2 + 1, torch.randn(case.hidden)
    return (
        x.to(x_dtype),
        residual.to(residual_dtype) if case.residual else None,
        weight.to(weight_dtype),
        bias.to(bias_dtype) if case.bias else None,
    )


@every_dtype
@pytest.mark.parametrize("case", NORMED, ids=str)
def test_add_layer_norm(model, case, dtype):
    check("add_layer_norm", add_layer_norm(model, case), *norm_arguments(case, *[dtype] * 4))


@every_dtype
def test_add_layer_norm_forward_of_the_widest_rows(model, dtype):
    """The second pass of a backward would take seconds here."""
    case = Normed(1, 16392, vectors=(False, False))
    with torch.no_grad():
        check("add_layer_norm", add_layer_norm(model, case), *norm_arguments(case, *[dtype] * 4))


@pytest.mark.parametrize(("rows", "hidden"), [(5, 40), (2, 33)])
def test_add_layer_norm_mixes_dtypes(model, rows, hidden):
    case = Normed(rows, hidden, vectors=(hidden == 40,) * 2)
    for x, residual, weight in itertools.product(DTYPES, repeat=3):
        if x == residual or weight == torch.float32:
            bias = torch.bfloat16 if weight == torch.float32 else weight  # its gradient is weight's
            arguments = norm_arguments(case, x, residual, weight, bias)
            check("add_layer_norm", add_layer_norm(model, case), *arguments)


@every_dtype
@pytest.mark.parametrize("case", [NORMED[1], NORMED[4], NORMED[9]], ids=str)
def test_statistics(model, case, dtype):
    """They are those of the total as it is stored: the backward reads it again."""
    args = norm_arguments(case, *[dtype] * 4)
    _, total, mean, rstd = add_layer_norm(model, case).forward(*args, 0.5)
    exact = (total if case.residual else args[0]).double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), atol=1e-6, rtol=1e-6)
    deviation = (exact.var(-1, correction=0) + 0.5).rsqrt()
    torch.testing.assert_close(rstd.double(), deviation, atol=0, rtol=1e-6)


# ---- segment_pool --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooled:
    lengths: tuple[int, ...]
    hidden: int
    vectors: bool = True
    most: int = 65535  # sequences of one launch
    shift: int = 0


POOLED = [
    Pooled((3, 70, 1, 0, 33), 72),
    Pooled((0, 5, 0, 0, 1, 32, 0), 40, most=2),
    Pooled((100,), 33, vectors=False),
    Pooled((31, 2, 64), 8, vectors=False, shift=1),
    Pooled((0, 0), 8),
    Pooled((1,), 1, vectors=False),
]


def segment_pool(model, case: Pooled) -> Callable:
    def forward(x, cu_seqlens, mode):
        placed, pooled = surrounded(x, case.shift), (len(cu_seqlens) - 1, x.shape[1])

        def call(out, index, order):
            return model["segment_pool_fwd"](
                DTYPES[x.dtype], MODES.index(mode), address(placed), address(cu_seqlens), out,
                index if mode == "max" else None, *pooled, case.most, order,
            )  # fmt: skip

        return tuple(outputs_of(
            call, (pooled, x.dtype), (pooled if mode == "max" else (0,), torch.int32),
            vectors=case.vectors, shift=case.shift,
        ))  # fmt: skip

    def backward(grad, index, cu_seqlens, total_tokens, mode):
        placed = [surrounded(grad, case.shift)]
        placed.append(surrounded(index, case.shift) if mode == "max" else None)

        def call(dx, order):
            return model["segment_pool_bwd"](
                DTYPES[grad.dtype], MODES.index(mode), *map(address, placed), address(cu_seqlens),
                dx, total_tokens, *grad.shape, order,
            )  # fmt: skip

        shape = (total_tokens, grad.shape[1])
        return outputs_of(call, (shape, grad.dtype), vectors=case.vectors, shift=case.shift)[0]

    op = differentiable("segment_pool", forward, backward)

    def fn(x, cu_seqlens, mode):
        return op(x, cu_seqlens, mode)[0]

    fn.forward, fn.backward = forward, backward
    return fn


@every_dtype
@pytest.mark.parametrize("case", POOLED, ids=str)
def test_segment_pool(model, case, dtype):
    x, cu = torch.randn(sum(case.lengths), case.hidden), testing.cu_seqlens_of(case.lengths)
    for mode in MODES:
        check("segment_pool", segment_pool(model, case), x.to(dtype), cu, mode=mode)


@every_dtype
def test_the_first_of_equal_maxima_wins(model, dtype):
    rules = importlib.import_module("fastenc.ops.segment_pool")
    case = Pooled((90, 0, 40, 7), 24)
    fn, cu = segment_pool(model, case), testing.cu_seqlens_of(case.lengths)
    x = torch.randint(-2, 3, (137, 24)).to(dtype)
    x[95:128:7, 3:9], x[:90, 5], x[130:, 7] = float("nan"), float("-inf"), -1.0
    out, index = fn.forward(x, cu, "max")
    expected, first = rules._forward_ref(x, cu, "max")
    torch.testing.assert_close(out, expected, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(index, first)
    grad = torch.randn(4, 24).to(dtype)
    dx = rules._backward_ref(grad, first, cu, 137, "max")
    assert torch.equal(fn.backward(grad, index, cu, 137, "max"), dx)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_does_not_see_its_neighbours(model, mode):
    """Between NaN neighbours a sequence's row, and its gradient, are those it has alone."""
    case = Pooled((4, 45, 3), 16)
    fn, cu, clean = segment_pool(model, case), testing.cu_seqlens_of(case.lengths), None
    x, grad = torch.randn(52, 16), torch.randn(3, 16)
    for _ in range(2):
        out, index = fn.forward(x, cu, mode)
        dx = fn.backward(grad, index, cu, 52, mode)
        seen = [out[1], dx[4:49]]
        if clean is not None:
            assert all(map(torch.equal, seen, clean))
        clean = seen
        x[:4], x[49:], grad[::2] = float("nan"), float("nan"), float("nan")
