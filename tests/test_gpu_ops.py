"""On a GPU: parity of every kernel at real and odd shapes, for each backend that serves CUDA."""

import pytest
import torch

import fastenc
from fastenc import testing

pytestmark = pytest.mark.gpu

OPS = (
    "geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention", "rope_varlen_attention",
    "span_pool", "span_score", "token_score", "disentangled_attention",
)  # fmt: skip
BACKENDS = ("triton", "cuda")


def need(op: str, backend: str) -> None:
    reason = fastenc.backends()[op][backend]
    if reason != "available":
        pytest.skip(f"{op} on {backend}: {reason}")


@pytest.mark.parametrize("case", [c for op in OPS for c in testing.cases(op)], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(case, dtype, backend):
    need(case.op, backend)
    public = getattr(fastenc, case.op)
    if case.op == "disentangled_attention" and case.settings["head_dim"] > 128:
        with fastenc.use_backend(backend), pytest.raises(NotImplementedError, match="up to 128"):
            testing.check_case(public, testing.reference_of(case.op), case, dtype, "cuda")
        return
    with fastenc.use_backend(backend), fastenc.record() as ran:
        testing.check_case(public, testing.reference_of(case.op), case, dtype, "cuda")
    assert set(ran.calls[case.op]) == {backend} and ran.fallbacks == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [10, 1000])
def test_candidates_are_the_scores_past_the_threshold(labels, backend):
    need("span_candidates", backend)
    start, end = (torch.randn(500, 256, device="cuda") * 0.1 for _ in range(2))
    args = (start, end, torch.randn(2, labels, 256, device="cuda") * 0.1,
            testing.cu_seqlens_of((384, 116), "cuda"), 12)  # fmt: skip
    with fastenc.use_backend(backend):
        *index, score = fastenc.span_candidates(*args, 0.6)
        again = fastenc.span_candidates(*args, 0.6)
    scores = torch.sigmoid(torch.ops.fastenc_reference.span_score_fwd(*args, None, 0.0, None))
    assert all(torch.equal(a, b) for a, b in zip((*index, score), again, strict=True))
    torch.testing.assert_close(scores[tuple(index)], score, atol=1e-5, rtol=1e-5)
    place = (index[0] * 12 + index[1]) * labels + index[2]
    assert (place.diff() > 0).all()
    assert (scores > 0.60001).sum() <= len(score) <= (scores > 0.59999).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(-1, -1), (64, 64), (300, 0)])
def test_attention_at_length(window, backend):
    """8192 tokens in one sequence against torch's SDPA in fp32, forward and gradients."""
    need("varlen_attention", backend)
    q, k, v = (torch.randn(8192, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cu = testing.cu_seqlens_of((8192,), "cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with fastenc.use_backend(backend):
        out = fastenc.varlen_attention(*leaves, cu, 8192, window)
    grad = torch.randn_like(out)
    actual = [out, *torch.autograd.grad(out, leaves, grad)]

    def plain(dtype):
        x = [t.to(dtype).transpose(0, 1)[None].requires_grad_() for t in (q, k, v)]
        i = torch.arange(8192, device="cuda")
        far = i.view(1, -1) - i.view(-1, 1)
        seen = torch.ones_like(far, dtype=torch.bool)
        if window[0] >= 0:
            seen &= far >= -window[0]
        if window[1] >= 0:
            seen &= far <= window[1]
        y = torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=seen)
        grads = torch.autograd.grad(y, x, grad.to(dtype).transpose(0, 1)[None])
        return [t[0].transpose(0, 1) for t in (y, *grads)]

    for name, a, b, c in zip(
        ("out", "dq", "dk", "dv"), actual, plain(torch.bfloat16), plain(torch.float32), strict=True
    ):
        testing.assert_parity(name, a, b, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(-1, -1), (64, 64)])
def test_dropout_mask_is_the_reference_one(window, backend):
    need("varlen_attention", backend)
    args = (*(torch.randn(700, 2, 64, device="cuda") for _ in range(3)),
            testing.cu_seqlens_of((333, 0, 367), "cuda"), 367)  # fmt: skip
    options = {"window_size": window, "dropout_p": 0.2, "seed": 2**40 - 3}
    with fastenc.use_backend(backend):
        actual = testing.run_with_gradients(fastenc.varlen_attention, args, options)
    with fastenc.use_backend("reference"):
        expected = testing.run_with_gradients(fastenc.varlen_attention, args, options)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
    for key, grad in expected[1].items():
        torch.testing.assert_close(actual[1][key], grad, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_disentangled_attention_past_the_buckets(dropout_p, backend):
    """DeBERTa-v3's shape, sequences longer than the buckets reach, against the reference; twice."""
    need("disentangled_attention", backend)
    lengths = (1100, 1, 0, 517)
    args = (*(torch.randn(sum(lengths), 2, 64, device="cuda") for _ in range(3)),
            *(torch.randn(2, 512, 64, device="cuda") for _ in range(2)),
            testing.cu_seqlens_of(lengths, "cuda"), max(lengths))  # fmt: skip
    options = {"dropout_p": dropout_p, "seed": 5 if dropout_p else None}
    with fastenc.use_backend(backend):
        actual, again = (
            testing.run_with_gradients(fastenc.disentangled_attention, args, options)
            for _ in range(2)
        )
    with fastenc.use_backend("reference"):
        plain, exact = (
            testing.run_with_gradients(fastenc.disentangled_attention, x, options)
            for x in (args, testing.to_double(args, {})[0])
        )
    testing.assert_parity("out", actual[0][0], plain[0][0], exact[0][0])
    assert torch.equal(actual[0][0], again[0][0])
    for key, grad in exact[1].items():
        testing.assert_parity(key, actual[1][key], plain[1][key], grad)
        assert torch.equal(actual[1][key], again[1][key]), f"{key}: not the same bits twice"


@pytest.mark.parametrize("backend", BACKENDS)
def test_past_two_to_the_31_elements(backend):
    """geglu and attention where offsets need 64 bits (12 GB of bf16)."""
    need("geglu", backend)
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    rows = 2**31 // 2304 + 100
    x = torch.randn(64, 2304, device="cuda", dtype=torch.bfloat16).repeat(-(-rows // 64), 1)
    with fastenc.use_backend(backend):
        y = fastenc.geglu(x)
        assert torch.equal(y[-64:], fastenc.geglu(x[-64:].clone()))
        del x, y
        tokens = 2**31 // (3 * 768) // 512 * 512 + 1024
        piece = torch.randn(512, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
        qkv = piece.repeat(tokens // 512, 1, 1, 1)
        cu = torch.arange(0, tokens + 1, 512, device="cuda", dtype=torch.int32)
        out = fastenc.varlen_attention(*qkv.unbind(1), cu, 512, (64, 64))
        assert torch.equal(out[-512:], out[:512])
