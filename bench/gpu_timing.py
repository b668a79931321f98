"""How a GPU is timed: L2-cold, by CUDA-graph replay, medians; and its ceilings in the same run.

Without a GPU the same calls run once or twice by the clock, in Triton's interpreter: sizes are toys
and the figures mean nothing, but every line of the benchmark has run.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 15
SECONDS = 2.0  # of rounds, of one call: a slow one has fewer


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


# ---- streams and graphs --------------------------------------------------------------------------


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextlib.contextmanager
def on_side_stream() -> Iterator[None]:
    """Everything inside is on the one stream that is captured.

    autograd runs a node on its forward's stream and joins its leaves': inputs, forward, warm-up and
    capture belong on the same one, or the capture meets the default stream and fails.
    """
    if not CUDA:
        yield
        return
    side, before = side_stream(), torch.cuda.current_stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):  # restored after a failed capture too, which leaves its own set
        yield
    before.wait_stream(side)


def captured(run: Call) -> Call | None:
    """The replay of ``run``, or None where it cannot be captured."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side_stream()):
            run()
    except Exception:
        del graph
        heal(pool)
        return None
    return graph.replay


def heal(pool: tuple[int, int]) -> None:
    """Undo what a capture that failed leaves behind in torch."""
    torch.cuda.synchronize()
    # The allocator still serves the capture from its pool: torch has not come to end that.
    with contextlib.suppress(RuntimeError):  # it had
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    # Before torch 2.13 the random generator believes that it is captured until a capture succeeds.
    x = torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side_stream()):
        x.add_(1)


def context_is_lost() -> bool:
    """Whether CUDA refuses everything from now on in this process, as after an illegal access."""
    if not CUDA:
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def free_memory() -> None:
    """What torch keeps for later, given back: the next row's sizes are others."""
    if CUDA:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


# ---- times ---------------------------------------------------------------------------------------


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


@on_side_stream()
def timed(calls: Sequence[Call], rounds: int = ROUNDS, graph: bool = True) -> Timing:
    """Median time of one call over a rotation of ``calls``, each with inputs of its own.

    ``graph``: False for what is known to synchronise, which no graph can hold.
    """
    if not CUDA:
        calls[0]()
        start = time.perf_counter()
        for call in calls:
            call()
        return Timing((time.perf_counter() - start) / len(calls), "clock")

    def rotate():
        for call in calls:
            call()

    rotate()
    rotate()
    torch.cuda.synchronize()
    replay = captured(rotate) if graph else None
    run, how = (replay, "graph") if replay else (rotate, "events")
    once = _events(run, 1)[0]
    rounds = max(3, min(rounds, int(SECONDS / max(once, 1e-9))))
    return Timing(statistics.median(_events(run, rounds)) / len(calls), how)


def wall_seconds(run: Call) -> float:
    """Of one call, until the GPU has done it."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_of(sample: Callable[[], float], rounds: int, deadline: Deadline) -> float:
    """Median of ``rounds`` samples, fewer where the time is up; one before them warms."""
    sample()
    samples = [sample()]
    while len(samples) < rounds and deadline.left > 0:
        samples.append(sample())
    return statistics.median(samples)


@on_side_stream()
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
