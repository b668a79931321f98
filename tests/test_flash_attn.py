"""flash_attn_varlen_func: flash-attn's arguments, their meaning, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops import _attention_ref as reference

pytestmark = pytest.mark.usefixtures("two_threads")

LENGTHS = (33, 0, 70, 1)
CU = testing.cu_seqlens_of(LENGTHS)


def inputs(heads=4, heads_k=4, head_dim=16, dtype=torch.float32):
    total = sum(LENGTHS)
    shapes = ((total, heads, head_dim), *((total, heads_k, head_dim),) * 2)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def attend(q, k, v, cu_k=CU, max_k=70, **options):
    return fastenc.flash_attn_varlen_func(q, k, v, CU, cu_k, 70, max_k, **options)


def test_the_order_of_the_arguments():
    """That of flash-attn 2.8."""
    assert list(inspect.signature(fastenc.flash_attn_varlen_func).parameters) == [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p",
        "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
        "return_attn_probs", "block_table",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize(("given", "window"), [
    ({}, (-1, -1)),
    ({"causal": True}, (-1, 0)),
    ({"causal": True, "window_size": (5, 17)}, (5, 0)),
    ({"window_size": (5, 17), "softmax_scale": 0.7, "deterministic": True}, (5, 17)),
])  # fmt: skip
@pytest.mark.parametrize("heads_k", [4, 2, 1])
def test_parity(given, window, heads_k, dtype):
    """Outputs, log-sum-exps and gradients; fewer key heads serve groups of query heads."""

    def ours(q, k, v):
        out, lse, nothing = attend(q, k, v, return_attn_probs=True, **given)
        assert nothing is None and lse.dtype == torch.float32
        return out, lse.to(dtype)

    def plain(q, k, v):
        k, v = (x.repeat_interleave(4 // heads_k, 1) for x in (k, v))
        scale = given.get("softmax_scale")
        out, lse = reference.varlen_attention_ref(q, k, v, CU, window, scale)
        return out, lse.to(q.dtype)

    args = inputs(heads_k=heads_k, dtype=dtype)
    case = testing.Case("flash", f"{given}-{heads_k}", lambda *_: (args, {}))
    testing.check_case(ours, plain, case, dtype)
    out = ours(*args)[0]
    assert torch.equal(attend(*args, **given), out)


def test_the_gradient_of_the_log_sum_exp_alone():
    args = inputs()
    cotangent = torch.randn(4, sum(LENGTHS))

    def gradients(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in args]
        lse = attend(*leaves)
        return torch.autograd.grad(lse, leaves[:2], cotangent.to(dtype))

    def plain(q, k, v):
        return reference.varlen_attention_ref(q, k, v, CU)[1]

    found = gradients(lambda *x: attend(*x, return_attn_probs=True)[1], torch.float32)
    draws = (found, gradients(plain, torch.float32), gradients(plain, torch.float64))
    for name, *three in zip("qk", *draws, strict=True):
        testing.assert_parity(f"gradient of {name}", *three)


def test_lengths_in_a_tensor_of_their_own():
    args = inputs()
    assert torch.equal(attend(*args, cu_k=CU.clone()), attend(*args))


def test_dropout_is_drawn_from_torchs_generator():
    args, made = inputs(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(attend(*args, dropout_p=0.5))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(("given", "words"), [
    ({"softcap": 3.0}, "softcap=3.0"),
    ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
    ({"block_table": torch.ones(4, 1)}, "block_table"),
    ({"cu_k": testing.cu_seqlens_of((34, 0, 69, 1))}, "self-attention lengths"),
    ({"cu_k": testing.cu_seqlens_of((33, 70, 1))}, "self-attention lengths"),
    ({"cu_k": CU.clone(), "max_k": 71}, "self-attention lengths"),
])  # fmt: skip
def test_what_is_not_supported(given, words):
    with pytest.raises(NotImplementedError, match=words):
        attend(*inputs(), **given)


def test_misuse():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="divides q's 4, got 3"):
        attend(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="divides q's 4, got 0"):
        attend(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="k: expected 3 dimensions"):
        attend(q, k[:, 0], v)
    with pytest.raises(TypeError, match="v: expected a floating-point tensor"):
        attend(q, k, v.int())
    with pytest.raises(TypeError, match="cu_seqlens_k: expected a tensor, got list"):
        attend(q, k, v, cu_k=CU.tolist())
    with pytest.raises(ValueError, match="window_size"):
        attend(q, k, v, window_size=(-2, 0))
