"""The choice of a backend, what is recorded, and what is refused."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys

import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops import _checks, _registry

OPS = (
    "add_layer_norm", "disentangled_attention", "geglu", "rope", "rope_varlen_attention",
    "segment_pool", "span_pool", "span_score", "token_score", "varlen_attention",
)  # fmt: skip


def test_backends_lists_every_op_and_backend():
    table = fastenc.backends()
    assert set(OPS) <= set(table)
    for op, row in table.items():
        assert set(row) == {"reference", "cpu", "triton", "cuda"}
        assert row["reference"] == "available" and row["cpu"] == "available", (op, row)
        assert all(reason for reason in row.values())


@pytest.mark.parametrize("op", OPS)
def test_the_default_is_the_cpu_kernel(op):
    case = next(testing.cases(op, "small"))
    args, kwargs = case.make(torch.float32)
    with fastenc.record() as ran:
        testing.run_with_gradients(getattr(fastenc, op), args, kwargs)
    assert ran.calls == {op: {"cpu": 1}, f"{op}_bwd": {"cpu": 1}} and ran.fallbacks == []


def test_a_backward_stays_on_its_forwards_backend():
    x = torch.randn(3, 8, requires_grad=True)
    with fastenc.use_backend("reference"):
        y = fastenc.geglu(x)
    with fastenc.record() as ran:
        y.sum().backward()
    assert ran.calls == {"geglu_bwd": {"reference": 1}}


def test_an_explicit_backend_never_falls_back():
    with (
        fastenc.use_backend("cuda"),
        pytest.raises(NotImplementedError, match=r"reference: available.*cuda: "),
    ):
        fastenc.geglu(torch.randn(2, 4))
    with fastenc.use_backend("cpu"), pytest.raises(NotImplementedError, match="float64"):
        fastenc.geglu(torch.randn(2, 4, dtype=torch.float64))


def test_unknown_backend():
    with pytest.raises(ValueError, match="vulkan"), fastenc.use_backend("vulkan"):
        pass
    done = subprocess.run(
        [sys.executable, "-c", "import fastenc"],
        env={"FASTENC_BACKEND": "vulkan", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "vulkan" in done.stderr


def test_backend_from_the_environment():
    code = (
        "import fastenc, torch\n"
        "with fastenc.record() as r: fastenc.geglu(torch.randn(2, 4))\n"
        "print(r.calls)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"FASTENC_BACKEND": "reference", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "{'geglu': {'reference': 1}}", done.stderr


def test_a_choice_ends_where_it_was_made():
    with fastenc.use_backend("reference"):
        with pytest.raises(KeyError), fastenc.use_backend("cpu"):
            raise KeyError
        with fastenc.record() as ran:
            fastenc.geglu(torch.randn(2, 4))
    assert ran.calls == {"geglu": {"reference": 1}}


@pytest.mark.parametrize(("backend", "device", "words"), [
    ("cpu", "meta", "it serves CPU tensors, got meta"),
    ("cuda", "cpu", "it serves CUDA tensors, got cpu"),
    ("triton", "cpu", "only under TRITON_INTERPRET=1"),
])  # fmt: skip
def test_a_backend_that_is_there_refuses_other_devices(backend, device, words, monkeypatch):
    monkeypatch.setattr(_registry, "unavailable", lambda name, backend: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fastenc.use_backend(backend), pytest.raises(NotImplementedError, match=words):
        fastenc.geglu(torch.ones(2, 4, device=device))


def test_debug_checks_read_device_memory_until_they_end():
    """The meta device stands in for a GPU: to read its contents is an error."""
    cu = torch.zeros(3, dtype=torch.int32, device="meta")

    def call():
        fastenc.segment_pool(torch.zeros(5, 4, device="meta"), cu)

    call()
    with fastenc.debug_checks():
        with fastenc.debug_checks(False):
            call()
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()
        assert _checks.readable(cu)
    assert not _checks.readable(cu)
    call()


def test_tensors_without_contents_are_not_read():
    with torch._subclasses.FakeTensorMode():
        x, cu = torch.randn(8, 2, 4), torch.zeros(3, dtype=torch.int32)
        assert fastenc.segment_pool(x[:, 0], cu).shape == (2, 4)
        assert fastenc.varlen_attention(x, x, x, cu, 8).shape == (8, 2, 4)
        positions = torch.zeros(8, dtype=torch.int64)
        assert fastenc.rope(x, torch.ones(9, 2), torch.ones(9, 2), positions).shape == (8, 2, 4)


def test_the_choice_is_the_threads_own():
    def other():
        with fastenc.record() as ran:
            fastenc.geglu(torch.randn(2, 4))
        return ran.calls

    with fastenc.use_backend("reference"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result() == {"geglu": {"cpu": 1}}


def test_float64_runs_in_plain_pytorch_and_says_so():
    with fastenc.record() as ran:
        fastenc.geglu(torch.randn(2, 4, dtype=torch.float64))
    assert ran.calls == {"geglu": {"reference": 1}} and "float64" in ran.fallbacks[0]


def test_records_nest_and_end():
    with fastenc.record() as outer:
        fastenc.geglu(torch.randn(2, 4))
        with fastenc.record() as inner:
            fastenc.geglu(torch.randn(2, 4))
    fastenc.geglu(torch.randn(2, 4))
    assert inner.calls == {"geglu": {"cpu": 1}} and outer.calls == {"geglu": {"cpu": 2}}


def test_fallbacks_reach_every_open_record_and_the_log_once(caplog):
    with fastenc.record() as outer:
        with fastenc.record() as inner:
            _registry.note_fallback("the first reason of this test")
        _registry.note_fallback("another reason of this test")
        _registry.note_fallback("the first reason of this test")
    _registry.note_fallback("another reason of this test")
    assert inner.fallbacks == ["the first reason of this test"]
    assert outer.fallbacks == ["the first reason of this test", "another reason of this test"]
    assert [r.getMessage() for r in caplog.records] == [
        "fastenc falls back: the first reason of this test",
        "fastenc falls back: another reason of this test",
    ]


def test_a_record_without_a_launch_stays_empty():
    script = (
        "import torch, fastenc\n"
        "with fastenc.record() as ran: pass\n"
        "fastenc.geglu(torch.zeros(2, 8))\n"
        "assert ran.calls == {}, ran.calls"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_inference_mode_reaches_cpp_without_python():
    """The default op has no Python kernel between the dispatcher and C++ under inference_mode."""
    dump = torch._C._dispatch_dump("fastenc::geglu_fwd")
    cpu_lines = [line for line in dump.splitlines() if line.startswith("CPU")]
    assert cpu_lines and "python" not in cpu_lines[0].lower()
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fastenc.geglu(torch.randn(2, 4))
    assert any(event.name == "fastenc::geglu_fwd" for event in profile.events())


def test_compiled_code_records_too_and_follows_the_backend():
    compiled = torch.compile(lambda x: fastenc.geglu(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8)
    compiled(x)
    with fastenc.record() as ran:
        compiled(x)
    assert ran.calls == {"geglu": {"cpu": 1}}
    with fastenc.use_backend("reference"), fastenc.record() as ran:
        compiled(x)
    assert ran.calls == {"geglu": {"reference": 1}}


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    """The kernels' parity tests under each instruction set that this machine has."""
    from fastenc import _C

    if _C.cpu_isa() == isa:
        return  # the rest of the suite runs on this one
    env = {**os.environ, "FASTENC_CPU_ISA": isa}
    probe = [sys.executable, "-c", "from fastenc import _C; print(_C.cpu_isa())"]
    found = subprocess.run(probe, env=env, capture_output=True, text=True)
    if found.returncode:
        assert "possible values" in found.stderr
        pytest.skip(f"this machine has no {isa}")
    tests = [t for t in (f"tests/test_{op}.py" for op in OPS) if os.path.exists(t)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-k", "test_parity and cpu"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_unknown_instruction_set():
    done = subprocess.run(
        [sys.executable, "-c", "import torch, fastenc; fastenc.geglu(torch.randn(2, 4))"],
        env={"FASTENC_CPU_ISA": "sse9", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "sse9" in done.stderr and "portable" in done.stderr
