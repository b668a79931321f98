"""fastenc's matrix product under the linear layers of a CPU: where it is taken, and its numbers."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastenc
from fastenc import testing
from fastenc.nn import linear
from fastenc.ops import backends
from fastenc.ops.linear import linear_geglu_ref

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        backends()["linear"]["cpu"] != "available", reason=backends()["linear"]["cpu"]
    ),
]


@pytest.fixture
def own_product(monkeypatch):
    monkeypatch.setattr(linear, "prefers_own", lambda gradients=False: True)


def products(run) -> int:
    """How often ``run`` takes fastenc's product."""
    with fastenc.record() as record:
        run()
    return record.calls.get("linear", {}).get("cpu", 0)


def op(x, weight, bias=None):
    y = x.new_full((len(x), len(weight)), float("nan"))
    torch.ops.fastenc.linear_fwd(x, weight, bias, y)
    return y


def strided(rows: int, columns: int, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    if layout == "gaps":
        return torch.randn(rows, columns + 5)[:, :columns]
    if layout == "no unit stride":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns)


# Past and before each edge: rows of a tile (4, 8, 9) and of a block (153, 160), few rows (48),
# columns of a tile and of a panel (3, 4, 24, 32, 48), few columns (24), a group (341), a run (192),
# a chunk of runs.
ROWS = (1, 5, 7, 48, 49, 170)
DEPTHS = (1, 17, 192, 390, 900)
COLUMNS = (25, 33, 70, 400)


@pytest.mark.parametrize(("rows", "depth"), itertools.product(ROWS, DEPTHS))
def test_every_edge(rows, depth):
    for columns in COLUMNS:
        x, w, b = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
        exact = x.double() @ w.double().T + b.double()
        testing.assert_parity(
            f"{rows}x{depth}x{columns}", op(x, w, b), nn.functional.linear(x, w, b), exact
        )


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 24])
@pytest.mark.parametrize("rows", [1, 3, 64, 333])
def test_few_columns(rows, columns):
    x, w, b = torch.randn(rows, 390), torch.randn(columns, 390), torch.randn(columns)
    exact = x.double() @ w.double().T + b.double()
    # Of so few numbers torch's may be exact by luck: the bound is that of the sum's terms.
    eps = torch.finfo(torch.float32).eps
    bound = 390**0.5 * eps * (x.abs().double() @ w.abs().double().T + b.abs().double())
    assert ((op(x, w, b) - exact).abs() <= bound).all()


LAYOUTS = ("dense", "transposed", "gaps", "no unit stride")


@pytest.mark.parametrize("w_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 40, 37), (75, 40, 37), (203, 801, 50)])
def test_layouts(shape, x_layout, w_layout):
    rows, depth, columns = shape
    x, w = strided(rows, depth, x_layout), strided(columns, depth, w_layout)
    testing.assert_parity("out", op(x, w), nn.functional.linear(x, w), x.double() @ w.double().T)


@pytest.mark.parametrize("rows", [3, 75])
def test_a_bias_with_gaps(rows):
    x, w, b = torch.randn(rows, 40), torch.randn(37, 40), torch.randn(37)
    gaps = torch.stack([b, b + 1], -1)[:, 0]
    assert torch.equal(op(x, w, gaps), op(x, w, b))


def test_nothing_to_add_up():
    assert op(torch.empty(0, 5), torch.randn(3, 5)).shape == (0, 3)
    assert op(torch.randn(2, 5), torch.empty(0, 5)).shape == (2, 0)
    for rows in (2, 60):
        bias = torch.randn(3)
        assert torch.equal(op(torch.empty(rows, 0), torch.empty(3, 0), bias), bias.expand(rows, 3))
        assert not op(torch.empty(rows, 0), torch.empty(3, 0)).any()


@pytest.mark.parametrize("rows", [2, 60])
def test_values_that_are_no_numbers_stay_in_their_row_and_column(rows):
    x, w = torch.randn(rows, 40), torch.randn(33, 40)
    x[1, 3], w[32, 5] = float("nan"), float("inf")
    y = op(x, w)
    assert y[1].isnan().all() and not y[torch.arange(rows) != 1, :32].isnan().any()
    assert y[0, 32].isinf()


@pytest.mark.parametrize("shape", [(3, 768, 500), (300, 768, 500)])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_are_bit_equal(shape, threads):
    rows, depth, columns = shape
    x, w = torch.randn(rows, depth), torch.randn(columns, depth)
    torch.set_num_threads(threads)
    assert torch.equal(op(x, w), op(x.clone(), w.clone()))


@pytest.mark.parametrize(
    ("x", "w", "b", "what"),
    [
        (torch.randn(2, 3), torch.randn(4, 5), None, "weight: expected"),
        (torch.randn(3), torch.randn(4, 3), None, "x: expected"),
        (torch.randn(2, 3), torch.randn(4, 3).double(), None, "weight: expected"),
        (torch.randn(2, 3), torch.randn(4, 3), torch.randn(3), "bias: expected"),
    ],
)
def test_bad_arguments(x, w, b, what):
    with pytest.raises(RuntimeError, match=what):
        op(x, w, b)


OTHERS = {
    "avx2": {"FASTENC_CPU_ISA": "avx2"},
    "portable": {"FASTENC_CPU_ISA": "portable"},
    "narrow": {"FASTENC_LINEAR_TILE": "narrow"},
    "wide": {"FASTENC_LINEAR_TILE": "wide"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_kernels(other):
    """This file's numbers again, in a process that takes another instruction set or tile."""
    if OTHERS[other].items() <= os.environ.items():
        pytest.skip("this is that process")
    tests = [
        "test_every_edge",
        "test_few_columns",
        "test_layouts",
        "test_nothing_to_add_up",
        "test_gated_edges",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(f"{__file__}::{test}" for test in tests)],
        env={**os.environ, **OTHERS[other]}, capture_output=True, text=True,
    )  # fmt: skip
    # FASTENC_CPU_ISA's error: a kernel of AVX2 cannot run where the processor has none.
    if "is not possible on this machine" in run.stderr + run.stdout:
        pytest.skip(f"this processor has no {other}")
    assert run.returncode == 0, run.stdout[-2000:]


def test_an_unknown_tile():
    code = "import fastenc, torch; x = torch.randn(64, 64); "
    code += "torch.ops.fastenc.linear_fwd(x, x, None, torch.empty(64, 64))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTENC_LINEAR_TILE": "tall"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "FASTENC_LINEAR_TILE: expected narrow or wide, got 'tall'" in run.stderr


def test_who_is_asked_for(monkeypatch):
    from fastenc.ops import _library

    choose = linear.prefers_own.__wrapped__
    for asked, intel, isa, own, with_gradients in (
        ("", False, "avx2", True, True), ("", True, "avx512", True, False),
        ("", False, "portable", False, False), ("torch", False, "avx512", False, False),
        ("fastenc", True, "portable", True, True),
    ):  # fmt: skip
        monkeypatch.setenv("FASTENC_LINEAR", asked)
        monkeypatch.setattr(_library._C, "cpu_is_intel", lambda intel=intel: intel)
        monkeypatch.setattr(_library._C, "cpu_isa", lambda isa=isa: isa)
        assert choose() == own, (asked, intel, isa)
        assert choose(gradients=True) == with_gradients, (asked, intel, isa)
    monkeypatch.setenv("FASTENC_LINEAR", "mkl")
    with pytest.raises(ValueError, match="FASTENC_LINEAR: expected torch or fastenc, got 'mkl'"):
        choose()


@pytest.mark.parametrize("rows", [(1,), (7,), (130,), (2, 5), (3, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_plain_layers_take_it(own_product, rows, bias):
    layer, x = nn.Linear(40, 24, bias=bias), torch.randn(*rows, 40)
    with torch.no_grad():
        taken = products(lambda: linear.linear(layer, x))
        y, plain = linear.linear(layer, x), layer(x)
        exact = copy.deepcopy(layer).double()(x.double())
    assert taken == (x.numel() > 0)
    testing.assert_parity("out", y, plain, exact)


def test_the_backend_that_was_chosen(own_product):
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    for backend, taken in (("cpu", 1), (None, 1), ("reference", 0)):
        with fastenc.use_backend(backend):
            assert products(lambda: linear.linear(layer, x)) == taken


def test_matrices_with_gaps(own_product):
    weight = torch.randn(24, 80)[:, :40]
    for x in (torch.randn(130, 40), torch.randn(40, 130).T, torch.randn(3, 40)):
        with torch.no_grad():
            y, plain = linear.product(x, weight), nn.functional.linear(x, weight)
        testing.assert_parity("out", y, plain, x.double() @ weight.double().T)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_whatever_else_is_called(own_product):
    x = torch.randn(3, 40)

    def taken(layer, x=x):
        with torch.no_grad():
            return products(lambda: linear.linear(layer, x))

    hooked = nn.Linear(40, 24)
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    assert taken(hooked) == 0 and seen
    for register in ("forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        hooked = nn.Linear(40, 24)
        getattr(hooked, f"register_{register}")(lambda *_: None)
        assert taken(hooked) == 0, register
    prepacked = linear.prepack(nn.Linear(40, 24))
    assert taken(prepacked) == 1 and prepacked not in linear._packed
    doubled = Doubled(40, 24)
    assert taken(doubled) == 0
    with torch.no_grad():
        assert torch.equal(linear.linear(doubled, x), doubled(x))
    plain = nn.Linear(40, 24)
    assert taken(plain) == 1
    replaced = nn.Linear(40, 24)
    replaced.forward = lambda x: x
    assert taken(replaced) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(plain) == 0
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert taken(plain) == 0
    try:
        torch.set_float32_matmul_precision("medium")
        assert taken(plain) == 0
    finally:
        torch.set_float32_matmul_precision("highest")
    assert taken(plain) == 1
    assert taken(nn.Linear(40, 24, dtype=torch.float64), x.double()) == 0


class Named(torch.Tensor):
    pass


def test_traced_transformed_and_of_a_class_of_its_own_it_is_torchs(own_product):
    layer, x = nn.Linear(40, 24).requires_grad_(False), torch.randn(5, 3, 40)
    expected = layer(x)
    assert products(lambda: linear.linear(layer, x)) == 1
    named = x.as_subclass(Named)
    assert products(lambda: linear.linear(layer, named)) == 0
    assert type(linear.linear(layer, named)) is Named
    torch.testing.assert_close(torch.func.vmap(lambda x: linear.linear(layer, x))(x), expected)
    slope = torch.func.grad(lambda x: linear.linear(layer, x).sum())(x)
    torch.testing.assert_close(slope, layer.weight.sum(0).expand(5, 3, 40))
    traced = torch.jit.trace(lambda x: linear.linear(layer, x), (x[:2],), check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    assert "fastenc::" not in str(traced.graph)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 40), (2, 5, 40)])
def test_gradients(own_product, bias, shape):
    layer = nn.Linear(40, 24, bias=bias)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(shape)
    dy = torch.randn(*shape[:-1], 24)

    def gradients(run, like, x, dy):
        x = x.clone().requires_grad_()
        return dict(zip(("x", "weight", "bias"), torch.autograd.grad(
            run(like, x), [x, *like.parameters()], dy), strict=False))  # fmt: skip

    found = gradients(linear.linear, layer, x, dy)
    plain = gradients(lambda m, x: m(x), layer, x, dy)
    true = gradients(lambda m, x: m(x), exact, x.double(), dy.double())
    assert found.keys() == true.keys() and len(found) == 2 + bias
    for name in true:
        testing.assert_parity(name, found[name], plain[name], true[name])
    step = x.clone().requires_grad_()
    assert products(lambda: linear.linear(layer, step).sum().backward()) == 3  # y, dx and dw


def test_only_what_needs_a_gradient_gets_one(own_product):
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    layer.weight.requires_grad_(False)
    linear.linear(layer, x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not linear.linear(layer, x).requires_grad


def test_gradients_of_gradients(own_product):
    weight, x = torch.randn(4, 6), torch.randn(5, 6)

    def penalty(product, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        (dx,) = torch.autograd.grad(product(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    found = penalty(linear.product, torch.float32)
    plain = penalty(nn.functional.linear, torch.float32)
    exact = penalty(nn.functional.linear, torch.float64)
    for name, *three in zip(("x", "weight"), found, plain, exact, strict=True):
        testing.assert_parity(name, *three)


def test_models_take_it(own_product):
    """Six products a BERT layer, four a ModernBERT layer."""
    from transformers import BertConfig, ModernBertConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 50}  # fmt: skip
    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    bert = fastenc.BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    modern = fastenc.ModernBertModel(ModernBertConfig(**sizes, **special)).eval()
    ids = torch.arange(5, 12).unsqueeze(0)
    with torch.inference_mode():
        assert products(lambda: bert(input_ids=ids)) == 12
        assert products(lambda: modern(input_ids=ids)) == 8


# ---- memory that is given ------------------------------------------------------------------------


def test_results_go_where_they_are_told(own_product):
    weight, bias, many = torch.randn(24, 40), torch.randn(24), torch.randn(2, 70, 40)
    room = torch.full((140, 24), float("nan"))

    def taken(out, weight=weight):
        y = linear.product(many, weight, bias, out)
        torch.testing.assert_close(y, nn.functional.linear(many, weight, bias))
        return y.data_ptr() == out.data_ptr()

    assert not taken(room) and not taken(room, nn.Parameter(weight)) and room.isnan().all()
    with torch.no_grad():
        assert taken(room) and taken(room.fill_(3))
        assert not taken(torch.empty(140, 25)) and not taken(torch.empty(24, 140).t())
        assert not taken(room.double())
        with fastenc.use_backend("reference"):
            assert not taken(room)


def test_memory_that_does_not_fit():
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    for y in (torch.empty(3, 5), torch.empty(4, 3).t(), torch.empty(2, 4), torch.empty(12)):
        with pytest.raises(RuntimeError, match="y: expected"):
            torch.ops.fastenc.linear_fwd(x, w, None, y)
        with pytest.raises(RuntimeError, match="y: expected"):
            torch.ops.fastenc.linear_geglu_fwd(x, w, None, "gelu", y)
    with pytest.raises(RuntimeError, match="y: expected"):
        torch.ops.fastenc.linear_fwd(x, w, None, torch.empty(3, 4).double())


# ---- gated ---------------------------------------------------------------------------------------


def gated_op(x, weight, bias, activation):
    y = x.new_full((len(x), len(weight) // 2), float("nan"))
    torch.ops.fastenc.linear_geglu_fwd(x, weight, bias, activation, y)
    return y


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (170, 40, 37), (70, 768, 200), (64, 1030, 130)])
def test_gated_edges(shape, activation):
    rows, depth, inner = shape
    x, w, b = torch.randn(rows, depth), torch.randn(2 * inner, depth), torch.randn(2 * inner)
    w /= depth**0.5
    for bias in (b, None):
        y, plain, exact = (
            run(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype), activation)
            for run, dtype in (
                (gated_op, torch.float32),
                (linear_geglu_ref, torch.float32),
                (linear_geglu_ref, torch.float64),
            )
        )
        testing.assert_parity("out", y, plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated_layouts(layout):
    x, w = strided(75, 40, layout), strided(74, 40, layout)
    plain, exact = (
        linear_geglu_ref(x.to(d), w.to(d), None, "gelu") for d in (x.dtype, torch.float64)
    )
    testing.assert_parity("out", gated_op(x, w, None, "gelu"), plain, exact)


def test_gated_with_nothing_to_do_and_bad_arguments():
    assert gated_op(torch.empty(0, 5), torch.randn(6, 5), None, "gelu").shape == (0, 3)
    assert not gated_op(torch.empty(70, 0), torch.empty(6, 0), None, "gelu").any()
    with pytest.raises(RuntimeError, match="weight: expected an even number of rows, got 3"):
        gated_op(torch.randn(2, 5), torch.randn(3, 5), None, "gelu")
    with pytest.raises(RuntimeError, match="activation: expected"):
        gated_op(torch.randn(2, 5), torch.randn(4, 5), None, "relu")


def test_when_a_layer_is_gated_in_one_kernel(own_product):
    layer = nn.Linear(40, 24)
    many, few = torch.randn(2, 70, 40), torch.randn(3, 40)

    def calls(x, layer=layer):
        with fastenc.record() as record:
            y = linear.gated(layer, x, "gelu")
        torch.testing.assert_close(
            y, fastenc.geglu(nn.functional.linear(x, layer.weight, layer.bias))
        )
        return sorted(record.calls)

    with torch.no_grad():
        assert calls(many) == ["linear_geglu"]
        assert calls(many, linear.prepack(copy.deepcopy(layer))) == ["linear_geglu"]
        assert calls(few) == ["geglu", "linear"]
        with fastenc.use_backend("reference"):
            assert calls(many) == ["geglu"]
        hooked = copy.deepcopy(layer)
        hooked.register_forward_hook(lambda *_: None)
        assert calls(many, hooked) == ["geglu"]
    assert calls(many) == ["geglu", "linear"]


def test_a_bias_of_one_element_is_torchs(own_product):
    x, weight, bias = torch.randn(70, 8), torch.randn(5, 8), torch.randn(1)
    assert torch.equal(linear.product(x, weight, bias), nn.functional.linear(x, weight, bias))
