"""float16 where it overflows in other libraries: scores, squares and sums past 65504 stay finite,
because kernels do their arithmetic in fp32; and whole models on the inputs that users report."""

from __future__ import annotations

import pytest
import torch

import fastenc
from fastenc.testing import assert_parity, cu_seqlens_of
from tests.model_tests import at, padded
from tests.test_cuda_graphs import MODELS, build

F16 = torch.float16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
@pytest.mark.parametrize("window", [(-1, -1), (64, 64)])
def test_scores_past_the_range_of_float16(window, device):
    q, k, v = (torch.randn(300, 3, 4, 64, device=device) * 60).unbind(1)
    cu = cu_seqlens_of((200, 0, 100), device)
    q, k, v = q.to(F16), k.to(F16), (v / 60).to(F16)
    assert (q.float()[:, 0] @ k.float()[:, 0].T).abs().max() > 65504
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = fastenc.varlen_attention(*leaves, cu, 200, window)
    exact = fastenc.varlen_attention(*(x.double() for x in (q, k, v)), cu, 200, window)
    plain = fastenc.varlen_attention(*(x.float() for x in (q, k, v)), cu, 200, window).to(F16)
    assert_parity("out", out, plain, exact)
    out.backward(torch.randn_like(out))
    assert all(x.grad.isfinite().all() for x in leaves)


@each_device
def test_squares_and_sums_past_the_range_of_float16(device):
    x = (torch.randn(40, 768, device=device) * 8000).to(F16).requires_grad_()
    weight = torch.ones(768, device=device, dtype=F16)
    normed, _ = fastenc.add_layer_norm(x, None, weight)
    exact = torch.nn.functional.layer_norm(x.double(), (768,), eps=1e-5)
    assert_parity("normed", normed, exact.to(F16), exact)
    normed.backward(torch.randn_like(normed))
    assert x.grad.isfinite().all()
    pooled = fastenc.segment_pool(x.detach(), cu_seqlens_of((40,), device))
    assert pooled.isfinite().all()


@each_device
def test_gates_far_from_zero(device):
    x = torch.tensor([[-6e4, 6e4, 300.0, -1e3, 0.5, 0.9, 200.0, 30.0]], device=device, dtype=F16)
    for activation in ("gelu", "gelu_tanh", "silu"):
        leaf = x.clone().requires_grad_()
        y = fastenc.geglu(leaf, activation)
        expected = (x[:, :4].double().clamp(min=0) * x[:, 4:].double()).to(F16)
        assert torch.equal(y, expected)
        y.backward(torch.full_like(y, 1e-3))
        assert leaf.grad.isfinite().all()


@each_device
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_models_with_padding_and_rows_of_padding(name, side, device):
    """All-padding rows and left padding give NaN in half precision elsewhere."""
    model = at(build(name), F16).to(device)
    ids, mask = padded((5, 0, 64, 1), 64, 97, side)
    ids, mask = ids.to(device), mask.to(device)
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert out.dtype == F16 and out.isfinite().all()
    assert (out[mask == 0] == 0).all()
    out.float().square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(g.isfinite().all() for g in gradients.values())
