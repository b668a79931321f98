"""How the GPU benchmark times: one stream, and captures that fail. A stand-in for torch.cuda keeps
what torch keeps: the current stream, the generator's flag, the pools that are being filled."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from bench import gpu_ops, gpu_record, gpu_timing


class Device:
    """torch.cuda before 2.13: a capture that fails leaves its stream, its pool and the flag."""

    def __init__(self):
        self.stream = "default"
        self.capturing = self.broken = self.generator_captured = False
        self.captures, self.filling, self.released = 0, [], []
        self.milliseconds = 1.0

    def synchronize(self):
        if self.capturing:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def random(self, *args, **options):
        if self.generator_captured and not self.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return torch.ones(2)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        before, self.stream = self.stream, stream
        self.captures += 1
        self.capturing, self.broken, self.generator_captured = True, False, True
        self.filling.append(pool)
        error = None
        try:
            yield
        except RuntimeError as raised:
            error = raised
        self.capturing = False
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.filling.remove(pool)
        self.generator_captured, self.stream = False, before
        if error:
            raise error

    def end_pool(self, device, pool):
        if pool not in self.filling:
            raise RuntimeError("not currently recording to mempool_id")
        self.filling.remove(pool)


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Stream(str):
        def wait_stream(self, other):
            pass

    def event(enable_timing):
        return types.SimpleNamespace(
            record=lambda: None, synchronize=lambda: None,
            elapsed_time=lambda end: device.milliseconds,
        )  # fmt: skip

    device.stream = Stream("default")
    gpu_timing.side_stream.cache_clear()
    for name, value in {
        "Stream": lambda: Stream("side"), "stream": device.on, "graph": device.graph,
        "current_stream": lambda: device.stream, "synchronize": device.synchronize,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None), "Event": event,
        "graph_pool_handle": lambda: (0, device.captures), "current_device": lambda: 0,
        "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_pool)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: device.released.append(pool))
    monkeypatch.setattr(torch, "randn_like", device.random)
    monkeypatch.setattr(gpu_timing, "CUDA", True)
    yield device
    gpu_timing.side_stream.cache_clear()


def test_a_backward_is_on_one_stream(device):
    """autograd runs it on its forward's: every call, the leaves' first use too, is on the side."""
    seen = []

    def make():
        seen.append(device.stream)
        leaf = torch.ones(2, requires_grad=True)
        return (leaf.view(2, 1),), (leaf,)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(device.stream)
            return (2 * x).flatten()

        @staticmethod
        def backward(ctx, grad):
            seen.append(device.stream)
            return 2 * grad.view(2, 1)

    row = gpu_ops.Row("geglu", "2", make, {"torch": lambda: Doubled.apply}, (1, 1))
    found: dict = {}
    gpu_ops._time(row, "torch", True, lambda: [make()], found)
    assert found["how"] == "graph" and found["seconds"] == 1e-3
    assert set(seen) == {"side"} and len(seen) == 5
    assert device.stream == "default"


def test_a_failed_capture_is_healed(device):
    timing = gpu_timing.timed([device.synchronize])
    assert timing.how == "events"
    assert device.captures == 2 and not device.filling and device.released == [(0, 0)]
    assert device.stream == "default"
    device.random()  # the generator's flag is down again
    assert gpu_timing.timed([lambda: None]).how == "graph"


def test_an_error_that_leaves_the_capture_whole_is_no_graph_either(device):
    def refuse():
        if device.capturing:
            raise RuntimeError("this peer takes no capture")

    assert gpu_timing.timed([refuse]).how == "events"
    assert not device.filling and device.released == []


def test_what_synchronises_tries_no_graph(device, monkeypatch):
    def make():
        return (torch.ones(2, requires_grad=True),), ()

    def waits(x):
        device.synchronize()
        return x

    runs = {"fastenc cuda": lambda: waits, "torch": lambda: lambda x: x}
    row = gpu_ops.Row(
        "span_candidates", "2", make, runs, (1, 0), synchronising=("fastenc cuda",)
    )  # fmt: skip
    found: dict = {}
    gpu_ops._time(row, "fastenc cuda", False, lambda: [make()], found)
    assert found["how"] == "events" and device.captures == 0
    gpu_ops._time(row, "torch", False, lambda: [make()], found)
    assert found["how"] == "graph"


def test_rows_that_synchronise_are_known(monkeypatch):
    from bench import gpu_gliner_ops

    rows = [*gpu_gliner_ops.span_rows(), *gpu_gliner_ops.disentangled_rows()]
    known = {row.op: row.synchronising for row in rows if row.synchronising}
    assert known == {
        "span_candidates": ("fastenc cuda", "fastenc triton"),
        "disentangled_attention": ("transformers",),
    }


def test_a_slow_call_has_fewer_rounds(device):
    calls = []
    device.milliseconds = 600.0
    gpu_timing.timed([lambda: calls.append(1)], graph=False)
    assert len(calls) == 2 + 1 + 3


def test_a_lost_context_is_noticed(device, monkeypatch):
    assert not gpu_timing.context_is_lost()

    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    assert gpu_timing.context_is_lost()
    gpu_timing.free_memory()


def test_kinds():
    kinds = {name: gpu_record.kind_of(name) for name in (
        "fastenc cuda", "fastenc, CUDA graphs", "torch", "FlexAttention", "torch.compile",
        "transformers torch.compile", "gliner's forward", "gliner's forward, torch.compile",
    )}  # fmt: skip
    assert [*kinds.values()] == [
        "fastenc", "fastenc", "peers", "compiled", "compiled", "compiled", "peers", "compiled",
    ]  # fmt: skip
