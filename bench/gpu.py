"""``python -m bench.gpu``: build, test and time everything on this machine's GPU in nine minutes.

Builds the CUDA library where nvcc is, runs ``pytest -m gpu``, times every op forward and backward
and ModernBERT, GLiNER, SetFit and embedding end to end beside their floors and peers, runs the CPU
kernels' tests, and writes one JSON to bench/results/<machine>/<date>-<commit>.json. Without a GPU
it runs at toy size in Triton's interpreter and writes to a temporary folder, unless --out names a
file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 525.0
# What each part may take of the whole, in the order in which they run; the rest is imports.
SHARES = {
    "build": 0.23, "gpu tests": 0.26, "ops": 0.24, "models": 0.11, "training": 0.04,
    "embedding": 0.02, "gliner": 0.02, "setfit": 0.02, "cpu tests": 0.05,
}  # fmt: skip
CPU_TESTS = (
    "tests/test_geglu.py", "tests/test_rope.py", "tests/test_add_layer_norm.py",
    "tests/test_segment_pool.py", "tests/test_varlen_attention.py",
)  # fmt: skip


def run(command: list[str], seconds: float, **environment: str) -> dict[str, object]:
    """Exit status, wall time and the end of the output of a command; a time-out is recorded."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0),
            env={**os.environ, **environment},
        )  # fmt: skip
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        status, output = "out of time", str(expired.stdout or "")
    return {
        "command": " ".join(["python", *command[1:]]),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": output[-4000:],
    }


def build(seconds: float) -> dict[str, object]:
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        return {"status": "no CUDA sources"}
    if shutil.which("nvcc") is None:
        return {"status": "no nvcc"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    return run([*pip, "-e", "."], seconds)


def tests(seconds: float, has_gpu: bool) -> dict[str, object]:
    """``pytest -m gpu``, of the files that have such tests: importing the rest takes a minute."""
    marked = (p for p in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in p.read_text())
    files = [str(path.relative_to(ROOT)) for path in marked]
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-rf", "--maxfail=25"]
    if not has_gpu:  # they are skipped by name; collecting them is what can break
        command.append("--collect-only")
    return run(command, seconds, TRITON_INTERPRET="0")


def cpu_tests(seconds: float, has_gpu: bool) -> dict[str, object]:
    files = [path for path in CPU_TESTS if (ROOT / path).exists()]
    command = [sys.executable, "-m", "pytest", *files, "-k", "cpu and parity", "-x"]
    if not has_gpu:
        command.append("--collect-only")
    return run(command, seconds, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")


def machine() -> dict[str, object]:
    import torch

    from bench import measure

    try:
        found: dict[str, object] = {"host": measure.machine()}
    except (ImportError, AttributeError) as error:
        found = {"host": {"error": str(error)}}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name, "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": p.L2_cache_size / 2**20,
            "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }  # fmt: skip
        name = re.sub(r"[^a-z0-9]+", "-", p.name.lower()).strip("-")
        found["name"] = next((chip for chip in ("h200", "h100", "a100") if chip in name), name)
    else:
        found["name"] = "interpreter"
    return found


def default_path(stamp: dict, has_gpu: bool) -> Path:
    from bench import measure

    folder = measure.RESULTS / str(stamp["machine"]["name"])
    if not has_gpu:
        folder = Path(tempfile.mkdtemp())
    return folder / f"{stamp['date']}-{stamp['commit']}.json"


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--no-build", action="store_true", help="do not build the CUDA library")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests")
    options = parser.parse_args(arguments)

    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    shares = {name: share * options.seconds for name, share in SHARES.items()}
    end = time.monotonic() + options.seconds
    result: dict[str, object] = {}
    if has_gpu and not options.no_build:  # before fastenc is imported
        result["build"] = build(shares["build"])
        print(f"build: {result['build']['status']}", flush=True)

    import fastenc
    from bench import (
        gpu_embedding,
        gpu_gliner,
        gpu_models,
        gpu_ops,
        gpu_setfit,
        gpu_training,
        measure,
    )
    from bench.gpu_timing import Deadline, ceilings

    result |= {
        "machine": machine(), "date": datetime.date.today().isoformat(),
        "commit": measure.commit(), "versions": measure.versions(),
        "backends": fastenc.backends(), "ceilings": ceilings(),
    }  # fmt: skip
    print(json.dumps(result["ceilings"]), flush=True)
    path = options.out or default_path(result, has_gpu)
    steps = {
        "gpu tests": lambda seconds: tests(seconds, has_gpu),
        "ops": lambda seconds: gpu_ops.measure(result["ceilings"], Deadline(seconds)),
        "models": lambda seconds: gpu_models.measure(result["ceilings"], Deadline(seconds)),
        "training": lambda seconds: gpu_training.measure(result["ceilings"], Deadline(seconds)),
        "embedding": lambda seconds: gpu_embedding.measure(result["ceilings"], Deadline(seconds)),
        "gliner": lambda seconds: gpu_gliner.measure(result["ceilings"], Deadline(seconds)),
        "setfit": lambda seconds: gpu_setfit.measure(result["ceilings"], Deadline(seconds)),
        "cpu tests": lambda seconds: cpu_tests(seconds, has_gpu),
    }
    for name, step in steps.items():
        if "tests" in name and options.no_tests:
            continue
        result[name] = step(max(min(shares[name], end - time.monotonic()), 1.0))
        if "tests" in name:
            print(f"{name}: {result[name]['status']}", flush=True)
        measure.write_json(path, result)  # after every step: a cut run keeps what it has
    print(path)
    return path


if __name__ == "__main__":
    main()
