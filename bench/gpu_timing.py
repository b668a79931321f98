"""How a GPU is timed: L2-cold, by CUDA-graph replay, medians; and its ceilings in the same run.

Without a GPU the same calls run once or twice by the clock, in Triton's interpreter: sizes are toys
and the figures mean nothing, but every line of the benchmark has run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 15


@dataclass(frozen=True)
class Timing:
    """Seconds a call, and how they were taken ("graph", "events" or "clock")."""

    seconds: float
    how: str


class Deadline:
    """What is left of a number of seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def cold_copies(bytes_a_call: int) -> int:
    """How many sets of inputs push each other out of L2 (twice its size, at most 16 GB in all)."""
    if not CUDA:
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = 2 * cache // max(bytes_a_call, 1) + 2
    return int(max(1, min(wanted, 64, 16e9 // max(bytes_a_call, 1))))


def _events(run: Call, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def timed(calls: Sequence[Call], rounds: int = ROUNDS, graph: bool = True) -> Timing:
    """Median time of one call over a rotation of ``calls``, each with inputs of its own."""
    if not CUDA:
        calls[0]()
        start = time.perf_counter()
        for call in calls:
            call()
        return Timing((time.perf_counter() - start) / len(calls), "clock")

    def rotate():
        for call in calls:
            call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        rotate()
        rotate()
    torch.cuda.synchronize()
    run, how = rotate, "events"
    if graph:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=side):
                rotate()
            run, how = captured.replay, "graph"
        except RuntimeError:
            torch.cuda.synchronize()
    run()
    return Timing(statistics.median(_events(run, rounds)) / len(calls), how)


def backward_call(forward: Call, leaves: Sequence[torch.Tensor]) -> Call:
    """A call of the backward alone; the forward has run."""
    out = forward()
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def copy_bandwidth() -> float:
    """Bytes/s read plus written."""
    count = 2**28 if CUDA else 2**14
    x = torch.randn(count, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / timed([lambda: y.copy_(x)]).seconds


def matrix_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of torch's matrix product, 8192 cubed."""
    n = 8192 if CUDA else 32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed([lambda: a @ b]).seconds


def ceilings() -> dict[str, float]:
    return {"copy": copy_bandwidth(), "matrix_bf16": matrix_rate()}


def attempt(call: Callable[[], Timing]) -> dict[str, object]:
    """The timing as plain data, or the error: a peer that fails is recorded, never fatal."""
    try:
        timing = call()
        return {"seconds": timing.seconds, "how": timing.how}
    except Exception as error:
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
