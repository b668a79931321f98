"""Machine, versions, clocks: what every figure is stamped with, and how two things are compared.

These machines are noisy: what is compared is interleaved round by round in one process, and the
figure is the median of the rounds.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "triton", "gliner",
    "setfit", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, object]:
    """The machine of this run; ``name`` is the folder of its results."""
    from fastenc import _C

    threads, cpu = torch.get_num_threads(), cpu_name()
    isa, maker = torch.backends.cpu.get_cpu_capability(), re.match(r"\w*", cpu)[0]
    return {
        "name": f"cpu-{threads}x-{isa}-{maker}".lower(),
        "cpu": cpu,
        "threads": threads,
        "torch_isa": isa,
        "fastenc_isa": _C.cpu_isa(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except OSError:  # no git: a copy of the sources
        return "unknown"
    return done.stdout.strip() or "unknown"


def stamp() -> dict[str, object]:
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """Written to a temporary name and renamed: an interrupted run loses nothing."""
    text = json.dumps(value, indent=indent, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def newest(folder: Path, pattern: str) -> dict:
    """What the last file of ``folder`` by name holds; {} if there is none."""
    files = sorted(folder.glob(pattern))
    return json.loads(files[-1].read_text()) if files else {}


def seconds(fn: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    fn()
    return clock() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    least: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each run in each round: every round runs all, so that noise hits all alike.

    Args:
        rounds: samples of each run.
        least: seconds that one sample takes at least; quick runs are repeated to fill it.
        clock: ``time.process_time`` where other work on the machine would disturb the wall's.
        warm: whether a run comes first that does not count; False where the caller made one.
    """
    repeats = dict.fromkeys(runs, 1)
    for name, run in runs.items():
        if warm:
            run()
        if least > 0:
            once = seconds(run, clock)
            repeats[name] = max(1, int(least / once)) if once else 1
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    gc.collect()
    for _ in range(rounds):
        for name in order:
            start = clock()
            for _ in range(repeats[name]):
                runs[name]()
            samples[name].append((clock() - start) / repeats[name])
        order.reverse()
    return samples


def median(samples: list[float]) -> float:
    return statistics.median(samples)


MATRIX_FLOPS = 2 * 2048 * 768 * 2304


def matrix_product() -> Callable[[], torch.Tensor]:
    """An fp32 linear layer at ModernBERT-base's Wi shape, 2048 tokens: ``MATRIX_FLOPS``; by
    fastenc's product or torch's, whichever fastenc takes on this machine."""
    from fastenc.nn.linear import linear

    x, layer = torch.randn(2048, 768), torch.nn.Linear(768, 2304, bias=False)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return linear(layer, x)

    return run


def sgemm_rate(rounds: int = 5) -> float:
    """FLOP/s of :func:`matrix_product`."""
    return MATRIX_FLOPS / median(interleaved({"linear": matrix_product()}, rounds, 0.05)["linear"])


def copy_bandwidth(rounds: int = 5) -> float:
    """Bytes/s read plus written by a large copy."""
    x = torch.randn(2**25)
    y = torch.empty_like(x)
    times = interleaved({"copy": lambda: y.copy_(x)}, rounds, 0.05)
    return 2 * x.numel() * 4 / median(times["copy"])
