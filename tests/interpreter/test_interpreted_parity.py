"""Parity of every Triton kernel, forward and every gradient, and proof that it is what ran."""

import itertools

import pytest
import torch

import fastenc
from fastenc import testing

ROW_OPS = ("geglu", "rope", "add_layer_norm", "segment_pool")
ATTENTION_OPS = ("varlen_attention", "rope_varlen_attention")


def check(case: testing.Case, dtype: torch.dtype) -> None:
    public = getattr(fastenc, case.op)
    with fastenc.record() as ran:
        testing.check_case(public, testing.reference_of(case.op), case, dtype)
    differentiable = case.settings.get("shape", (1,))[0] > 0
    assert ran.calls == {
        name: {"triton": 1} for name in (case.op, f"{case.op}_bwd")[: 1 + differentiable]
    }
    assert ran.fallbacks == []


ROW_CASES = [case for op in ROW_OPS for case in testing.cases(op, "small")]


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_row_kernels(case, dtype):
    check(case, dtype)


# Attention takes seconds a case here: every case in fp32, and the 16-bit dtypes take turns.
ATTENTION_CASES = [
    (case, dtype)
    for op in ATTENTION_OPS
    for i, case in enumerate(testing.cases(op, "small"))
    for dtype in (torch.float32, testing.DTYPES[1 + i % 2])
]


@pytest.mark.parametrize(("case", "dtype"), ATTENTION_CASES, ids=str)
def test_attention(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("op", ATTENTION_OPS)
@pytest.mark.parametrize(
    ("name", "window"),
    [("sm_90", (-1, -1)), ("sm_90", (64, 64)), ("sm_90", (9, 100)), ("sm_80", (64, 64))],
)
def test_tiles_of_a_gpu(op, name, window, chip):
    """The tiles that a GPU gets by default, head_dim 64, across their edges."""
    chip(name)
    case = next(
        c for c in testing.cases(op, "test")
        if c.settings["lengths"] == (127, 128, 129) and c.settings["head_dim"] == 64
    )  # fmt: skip
    args, kwargs = case.make(torch.bfloat16)
    kwargs = {**kwargs, "window_size": window}
    resized = testing.Case(case.op, case.name, lambda *_: (args, kwargs), case.settings)
    check(resized, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [1, 33, 80, 96, 128])
@pytest.mark.parametrize("window", [(-1, -1), (5, 5)])
def test_head_dims(head_dim, window):
    q, k, v = (torch.randn(21, 1, head_dim) for _ in range(3))
    cu = testing.cu_seqlens_of((2, 19))
    case = testing.Case(
        "varlen_attention", f"d{head_dim}", lambda *_: ((q, k, v, cu, 19), {"window_size": window})
    )
    check(case, torch.float32)


@pytest.mark.parametrize("window", [(-1, -1), (4, 4), (3, -1), (30, 2)])
@pytest.mark.parametrize("op", ATTENTION_OPS)
def test_dropout_has_the_gradients_of_the_reference(op, window):
    """The same mask everywhere, so outputs and gradients agree to rounding."""
    case = next(c for c in testing.cases(op, "small") if c.settings["head_dim"] == 32)
    args, kwargs = case.make(torch.float32)
    kwargs = {**kwargs, "window_size": window, "dropout_p": 0.3, "seed": -12345678901}
    public = getattr(fastenc, op)
    actual = testing.run_with_gradients(public, args, kwargs)
    with fastenc.use_backend("reference"):
        expected = testing.run_with_gradients(public, args, kwargs)
    for a, b in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    for key, b in expected[1].items():
        if b is not None:
            torch.testing.assert_close(actual[1][key], b, atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("window", [(-1, -1), (6, 6)])
def test_log_sum_exp_and_its_gradient(window):
    q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
    cu = testing.cu_seqlens_of((7, 33))

    def attend(q, k, v):
        out, lse, _ = fastenc.flash_attn_varlen_func(
            q, k, v, cu, cu, 33, 33, window_size=window, return_attn_probs=True
        )
        return out, lse

    actual = testing.run_with_gradients(attend, (q, k, v), {})
    with fastenc.use_backend("reference"):
        expected = testing.run_with_gradients(attend, (q, k, v), {})
    for a, b in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(a, b)
    for key, b in expected[1].items():
        torch.testing.assert_close(actual[1][key], b, msg=key)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("window", [(-1, -1), (6, 6)])
def test_any_scale(scale, window):
    args = (*(torch.randn(20, 1, 16) for _ in range(3)), testing.cu_seqlens_of((3, 17)), 17)
    kwargs = {"window_size": window, "scale": scale}
    check(testing.Case("varlen_attention", "scale", lambda *_: (args, kwargs)), torch.float32)


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [c for c in itertools.product(testing.DTYPES, (None, *testing.DTYPES), testing.DTYPES)
     if len({*c} - {None}) > 1],
    ids=str,
)  # fmt: skip
def test_add_layer_norm_mixes_dtypes(x, residual, weight):
    rows = torch.randn(5, 33).to(x)
    more = None if residual is None else torch.randn(5, 33).to(residual)
    args = rows, more, *(torch.randn(33).to(weight) for _ in range(2))
    check(testing.Case("add_layer_norm", "mixed", lambda *_: (args, {})), x)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "more"), [(600, True), (1100, True), (1280, False), (8200, True)]
)
def test_add_layer_norm_past_a_power_of_two(hidden, more, dtype):
    """Whole rows, and rows that are walked in blocks."""
    x, weight = torch.randn(5, hidden, dtype=dtype), torch.randn(hidden, dtype=dtype)
    args = x, torch.randn_like(x) if more else None, weight, weight / 2 if more else None
    check(testing.Case("add_layer_norm", "wide", lambda *_: (args, {})), dtype)
