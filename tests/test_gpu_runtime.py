"""On a GPU: repeats, graphs, streams, devices, autocast, compile, and no hidden synchronisation."""

import pytest
import torch

import fastenc
from fastenc import testing

pytestmark = pytest.mark.gpu

LENGTHS = (323, 0, 1, 512, 77)


def calls(dtype=torch.bfloat16, device="cuda"):
    """{name: (fn, leaf)}: one differentiable call of every op."""
    total = sum(LENGTHS)
    cu = testing.cu_seqlens_of(LENGTHS, device)
    qkv = torch.randn(total, 3, 4, 64, device=device, dtype=dtype)
    x = torch.randn(total, 768, device=device, dtype=dtype)
    weight = torch.randn(768, device=device, dtype=dtype)
    cos, sin = (t.to(device, dtype) for t in testing.rope_tables(512, 64))
    positions = torch.arange(total, device=device) % 512
    bias = torch.randn(4, 32, device=device, dtype=dtype)

    def attention(window, **options):
        return lambda t: fastenc.varlen_attention(*t.unbind(1), cu, 512, window, **options)

    def rope_attention(window):
        return lambda t: fastenc.rope_varlen_attention(t, cos, sin, cu, 512, window)

    labels = torch.randn(len(LENGTHS), 25, 768, device=device, dtype=dtype)
    factors = torch.randn(768, 192, device=device, dtype=dtype)
    rows = torch.randn(4, 512, 64, device=device, dtype=dtype)

    def token_score(t):
        words = t[:, :192], labels[..., :192], factors, labels[0, :3]
        return fastenc.token_score(t, labels, *words, cu)

    def disentangled(t):
        return fastenc.disentangled_attention(*t.unbind(1), rows, rows, cu, 512)

    return {
        "geglu": (fastenc.geglu, x),
        "span_pool": (lambda t: fastenc.span_pool(t, x, cu, 12), x),
        "span_score": (lambda t: fastenc.span_score(t, x, labels, cu, 12), x),
        "token_score": (token_score, x),
        "disentangled_attention": (disentangled, qkv),
        "rope": (lambda t: fastenc.rope(t, cos, sin, positions), qkv[:, :2]),
        "add_layer_norm": (lambda t: fastenc.add_layer_norm(t, x, weight)[0], x),
        "segment_pool": (lambda t: fastenc.segment_pool(t, cu), x),
        "segment_max": (lambda t: fastenc.segment_pool(t, cu, "max"), x),
        "attention": (attention((-1, -1)), qkv),
        "windowed": (attention((64, 64)), qkv),
        "dropout": (attention((-1, -1), dropout_p=0.1, seed=3), qkv),
        "bias": (attention((-1, -1), rel_bias=bias), qkv),
        "rope_attention": (rope_attention((-1, -1)), qkv),
        "rope_windowed": (rope_attention((64, 64)), qkv),
    }


NAMES = tuple(calls(device="cpu"))
each_op = pytest.mark.parametrize("name", NAMES)
each_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])


@pytest.fixture
def on(backend, request):
    """Run on ``backend`` or skip by name."""
    name = request.node.callspec.params.get("name")
    for op, reasons in fastenc.backends().items():
        if op in ("varlen_attention", "geglu", name) and reasons[backend] != "available":
            pytest.skip(f"{op} on {backend}: {reasons[backend]}")
    with fastenc.use_backend(backend):
        yield


def step(fn, x):
    leaf = x.detach().requires_grad_()
    y = fn(leaf)
    g = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


@each_backend
@each_op
def test_repeats_are_bit_equal(name, on, backend):
    fn, x = calls()[name]
    first = step(fn, x)
    for _ in range(3):
        for a, b in zip(first, step(fn, x), strict=True):
            assert torch.equal(a, b)


@each_backend
@each_op
def test_cuda_graph_replays_on_new_contents(name, on, backend):
    fn, x = calls()[name]
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(fn, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(fn, static)
    fresh = torch.randn_like(x)
    static.copy_(fresh)
    graph.replay()
    for a, b in zip(captured, step(fn, fresh), strict=True):
        assert torch.equal(a, b)


@each_backend
@each_op
def test_other_stream(name, on, backend):
    fn, x = calls()[name]
    expected = step(fn, x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = x.clone()
        torch.cuda._sleep(10_000_000)  # a kernel on the wrong stream would read too early
        z = y * 1
        actual = step(fn, z)
    side.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@each_backend
@each_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device_than_the_current_one(name, on, backend):
    torch.manual_seed(0)
    fn, x = calls(device="cuda:1")[name]
    assert torch.cuda.current_device() == 0
    actual = step(fn, x)
    with torch.cuda.device(1):
        expected = step(fn, x)
    for a, b in zip(actual, expected, strict=True):
        assert a.device.index == 1 and torch.equal(a, b)


@each_backend
@each_op
def test_no_synchronisation(name, on, backend):
    fn, x = calls()[name]
    step(fn, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(fn, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
@each_op
def test_autocast(name, on, backend):
    fn, x = calls(torch.float32)[name]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, grad = step(fn, x)
    norm = name.startswith(("add_layer_norm", "segment"))
    assert y.dtype == (torch.float32 if norm else torch.bfloat16)
    assert grad.dtype == torch.float32 and torch.isfinite(grad).all()


@each_backend
def test_compiles_once_for_all_lengths(on, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    def block(qkv, gate, cu, longest):
        y = fastenc.varlen_attention(*qkv.unbind(1), cu, longest, (64, 64))
        return fastenc.geglu(gate) + y.flatten(1)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for lengths in ((30, 70), (5, 9, 100), (64,), (17, 3, 2, 80)):
        total = sum(lengths)
        args = (
            torch.randn(total, 3, 2, 64, device="cuda"), torch.randn(total, 256, device="cuda"),
            testing.cu_seqlens_of(lengths, "cuda"), max(lengths),
        )  # fmt: skip
        torch.testing.assert_close(compiled(*args), block(*args))
    assert counter.frame_count <= 2


def test_lengths_do_not_recompile_triton_kernels():
    from fastenc.triton_kernels import varlen_attention_fwd, windowed_attention_fwd

    kernels = varlen_attention_fwd.forward_kernel, windowed_attention_fwd.windowed_forward_kernel

    def built():
        return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

    def run(lengths):
        qkv = torch.randn(sum(lengths), 3, 2, 64, device="cuda", dtype=torch.bfloat16)
        cu = testing.cu_seqlens_of(lengths, "cuda")
        for window in ((-1, -1), (64, 64)):
            fastenc.varlen_attention(*qkv.unbind(1), cu, max(lengths), window)

    with fastenc.use_backend("triton"):
        run((64, 64))
        before = built()
        for lengths in ((1,), (17, 500, 3), (4096,), (2,) * 300):
            run(lengths)
    assert built() == before


def test_gpu_default_is_not_plain_pytorch():
    """On CUDA tensors the default op reaches CUDA C++, else Triton."""
    with fastenc.record() as ran:
        for fn, x in calls().values():
            step(fn, x)
    for op, backends in ran.calls.items():
        assert "reference" not in backends, (op, backends)
