"""The hand-packed peer of the GPU benchmark computes ModernBERT; torch's varlen attention, which
runs on a GPU only, is stood in for by the op that is tested against it there."""

import copy

import pytest
import torch
import torch.nn.attention.varlen as varlen

import fastenc
from bench import gpu_gliner, gpu_gliner_ops, gpu_models, gpu_packed_peer
from fastenc.testing import assert_parity
from tests.model_tests import telling


def test_packed_peer_is_modernbert(monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
        return fastenc.varlen_attention(q, k, v, cu_q, max_q, window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model = copy.deepcopy(gpu_models.build("toy")).to("cpu", torch.float32)
    inputs = {name: x.cpu() for name, x in gpu_models.batch(gpu_models.TOY_ROWS[1], 64).items()}
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        actual = gpu_packed_peer.forward(model, **inputs)[real]
        plain = model(**inputs).last_hidden_state[real]
        exact = model.double()(**inputs).last_hidden_state[real]
    assert_parity("hidden", actual, plain, exact)


def test_plain_gliner_is_gliner():
    torch.manual_seed(0)
    model = telling(gpu_gliner.build(gpu_gliner.TOY))
    packed, padded = gpu_gliner.inputs(model, 4)
    mask = packed.span_mask(model.config.max_width)
    with torch.inference_mode():
        actual = gpu_gliner.PlainGLiNER(model).eval()(padded)
        actual = gpu_gliner.valid(actual, padded.lengths)
        expected = model.logits(packed)[mask]
    assert actual.shape == expected.shape and abs(actual - expected).max() < 1e-5
    assert expected.std() > 1e-3


@pytest.mark.parametrize("rows", [gpu_gliner_ops.span_rows, gpu_gliner_ops.token_rows])
def test_plain_heads_are_the_ops(rows, monkeypatch):
    """What the rows of span_score and token_score time as "torch" is what the op computes."""
    monkeypatch.setattr(gpu_gliner_ops, "ours", lambda op, fn: {"fastenc": lambda: fn})
    monkeypatch.setattr(gpu_gliner_ops, "DEVICE", "cpu")
    row = next(rows())
    args = [x.detach().float().cpu() for x in row.make()[0]]
    actual, expected = (row.runs[name]()(*args) for name in ("torch", "fastenc"))
    valid = expected.isfinite()
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual[valid], expected[valid], atol=1e-4, rtol=1e-4)
