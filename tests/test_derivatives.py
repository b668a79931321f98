"""Derivatives beyond the first gradient: right, or refused; never zeros without a word."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import fastenc
from fastenc import testing
from fastenc.nn.linear import linear

OPS = ("geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention", "span_pool",
       "rope_varlen_attention", "span_score", "token_score", "disentangled_attention")  # fmt: skip


def first_case(op: str) -> tuple[list, dict]:
    case = next(c for c in testing.cases(op, "small") if c.settings.get("shape", (1,))[0] > 0)
    args, kwargs = case.make(torch.float32)
    return list(args), kwargs


def differentiable(op: str, args: list) -> list[int]:
    """Places of the arguments that have gradients; the tables of RoPE have none."""
    return [
        i for i, x in enumerate(args)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not (i > 0 and "rope" in op)
    ]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_a_gradient_is_refused(op, backend):
    args, kwargs = first_case(op)
    leaves = [args[i].requires_grad_() for i in differentiable(op, args)]
    with fastenc.use_backend(backend):
        out = tree_leaves(getattr(fastenc, op)(*args, **kwargs))
        value = sum(x.square().sum() for x in out)
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        with pytest.raises(NotImplementedError, match=f"{op}: the gradient of its gradient"):
            penalty.backward()


def test_an_accelerated_model_refuses_a_gradient_penalty():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config)
    x = torch.randn(2, 5, 32, requires_grad=True)

    def penalty():
        state = model(inputs_embeds=x).last_hidden_state.square().sum()
        return torch.autograd.grad(state, x, create_graph=True)[0].square().sum()

    fastenc.accelerate(model)
    with pytest.raises(NotImplementedError, match="create_graph"):
        penalty().backward()
    fastenc.restore(model)
    penalty().backward()
    assert model.encoder.layer[0].output.dense.weight.grad.abs().max() > 0


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op):
    args, kwargs = first_case(op)
    with forward_ad.dual_level():
        expected = getattr(fastenc, op)(*args, **kwargs)  # nothing has a tangent
        for i in differentiable(op, args):
            dual = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
            with pytest.raises(NotImplementedError, match=f"{op}: forward-mode"):
                getattr(fastenc, op)(*args[:i], dual, *args[i + 1 :], **kwargs)
    again = getattr(fastenc, op)(*args, **kwargs)
    for a, b in zip(tree_leaves(expected), tree_leaves(again), strict=True):
        assert torch.equal(a, b)


def test_forward_mode_of_func_is_refused():
    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(fastenc.geglu, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("trained", [False, True])
def test_linear_is_torchs_under_forward_mode_and_batched_gradients(trained):
    layer = nn.Linear(8, 5).requires_grad_(trained)
    x = torch.randn(3, 8, requires_grad=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.randn(3, 8))
        ours, theirs = (forward_ad.unpack_dual(f(dual)).tangent for f in (
            lambda x: linear(layer, x), layer))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    cotangents = torch.randn(4, 3, 5)
    ours, theirs = (
        torch.autograd.grad(y, x, cotangents, is_grads_batched=True)[0]
        for y in (linear(layer, x), layer(x))
    )
    torch.testing.assert_close(ours, theirs)


def test_linear_has_gradients_of_gradients():
    layer = nn.Linear(8, 5)
    x = torch.randn(3, 8, requires_grad=True)
    found = []
    for y in (linear(layer, x), layer(x)):
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*found)
