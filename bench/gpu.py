"""``python -m bench.gpu``: build, test and time everything on this machine's GPU in nine minutes.

Installs fastenc, with the CUDA library where nvcc is, runs GPU tests and the CPU kernels' tests,
times every op forward and backward and ModernBERT, GLiNER, SetFit and embedding end to end beside
their floors and peers, and writes one JSON to bench/results/<machine>/<date>-<commit>.json. What
fails or hangs costs its own row; the file says why a row is missing, and holds at any moment what
has been measured. Without a GPU it runs at toy size in Triton's interpreter and writes to a
temporary folder, unless --out names a file.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu_process import OUT_OF_TIME, ROOT, run

SECONDS = 525.0
# What each part may take of the whole, in the order in which they run; what one leaves, the
# others share.
SHARES = {"build": 0.23, "gpu tests": 0.25, "cpu tests": 0.04, "measuring": 0.48}
CPU_TESTS = (
    "tests/test_geglu.py", "tests/test_rope.py", "tests/test_add_layer_norm.py",
    "tests/test_segment_pool.py", "tests/test_varlen_attention.py",
)  # fmt: skip
TEST_SECONDS = 45  # a test that takes longer hangs
STARTS = 10  # of the measuring process, at most


def build(seconds: float) -> dict[str, object]:
    """Install fastenc; without the CUDA library where that fails, for Triton and the CPU."""
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation"]
    start = time.monotonic()
    done = run([*pip, "-e", "."], seconds)
    if done["status"] != 0:
        left = max(seconds / 2, seconds - (time.monotonic() - start))
        done["without CUDA"] = run([*pip, "-e", "."], left, FASTENC_CUDA="0")
    return done


def workers() -> list[str]:
    """Compiling Triton's kernels is what GPU tests spend their time on, and the host does that."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(os.cpu_count() or 1, 12)), "--maxschedchunk", "4"]  # in order, nearly


def run_tests(
    files: list[str], seconds: float, *options: str, **environment: str
) -> dict[str, object]:
    """pytest on ``files``: its end, and what bench/pytest_gpu.py noted of each test."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "tests.jsonl"
        plugin = ["-p", "bench.pytest_gpu", "--each-test", str(TEST_SECONDS)]
        done = run(
            [sys.executable, "-m", "pytest", *files, *plugin, "--tb=short",
             "--continue-on-collection-errors", *workers(), *options],
            seconds, TRITON_INTERPRET="0", OMP_NUM_THREADS="2", FASTENC_TEST_NOTES=str(notes),
            **environment,
        )  # fmt: skip
        return done | summary(notes.read_text() if notes.exists() else "")


def summary(notes: str) -> dict[str, object]:
    """Counts by outcome of all tests that were collected, and what failed."""
    collected, out, outcomes, reasons = 0, 0, {}, {}
    for line in notes.splitlines():
        note = json.loads(line)
        collected, out = note.get("collected", collected), note.get("left out", out)
        if "test" in note:
            outcomes[note["test"]], reasons[note["test"]] = note["outcome"], note["why"]
    counts = collections.Counter(outcomes.values())
    wrong = [name for name, outcome in outcomes.items() if outcome in ("failed", "not collected")]
    skipped = collections.Counter(reasons[n] for n, how in outcomes.items() if how == "skipped")
    reached = sum(counts.values()) - counts["not collected"]
    return {
        "collected": collected, "ran": counts["passed"] + counts["failed"],
        "outcomes": dict(counts), "left out": out, "not reached": collected - out - reached,
        "failures": {name: reasons[name] for name in wrong[:200]},
        "skipped": dict(skipped.most_common(40)),
    }  # fmt: skip


def gpu_tests(seconds: float, has_gpu: bool) -> dict[str, object]:
    """``pytest -m gpu``, of the files that have such tests: importing the rest takes a minute.

    In the CUDA library first; of the parity cases on Triton each in one dtype, not in three.
    """
    marked = (p for p in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in p.read_text())
    files = [str(path.relative_to(ROOT)) for path in marked]
    options = ["-m", "gpu", "--thin-triton"]
    if not has_gpu:  # they are skipped by name; collecting them is what can break
        options.append("--collect-only")
    return run_tests(files, seconds, *options)


def cpu_tests(seconds: float, has_gpu: bool) -> dict[str, object]:
    files = [path for path in CPU_TESTS if (ROOT / path).exists()]
    options = ["-k", "cpu and parity"] + ([] if has_gpu else ["--collect-only"])
    return run_tests(files, seconds, *options, CUDA_VISIBLE_DEVICES="")


def measuring_command(path: Path, seconds: float) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_steps", str(path), "--seconds", f"{seconds:.1f}"]


def measure_all(path: Path, left: Callable[[], float]) -> None:
    """The measuring process until it is done; behind each run that takes it down, the next one."""
    from bench import measure
    from bench.gpu_record import LOST, load, note_death

    ends = []
    while len(ends) < STARTS and left() > 1:
        # faulthandler begins with the word for a hang, and goes on with every thread.
        done = run(measuring_command(path, left() - 1), left(), show=True, tail=10**6)
        result = load(path)
        status = done["status"]
        ends.append({key: done[key] for key in ("status", "seconds")})
        if status not in (0, LOST):
            ends[-1]["output"] = done["output"][-4000:]
        result["processes"] = result.get("processes", []) + ends[-1:]
        went_on = status == LOST or (status != 0 and note_death(result, status, done["output"]))
        measure.write_json(path, result, indent=None)
        if status != 0:
            print(f"measuring: {status}\n{done['output'][-2000:]}", flush=True)
        if not went_on or status == OUT_OF_TIME:
            return


def finish(path: Path, out: Path | None) -> Path:
    """Say what was not reached, and move the file to its name."""
    from bench import measure
    from bench.gpu_record import STEPS, load

    result = load(path)
    for name in STEPS:
        if name not in result.get("step_seconds", {}):
            result.setdefault("step_errors", {}).setdefault(name, "not reached, or cut short")
    if out is None and "machine" in result:
        folder = measure.RESULTS / str(result["machine"]["name"])
        if "gpu" not in result["machine"]:
            folder = path.parent
        out = folder / f"{result['date']}-{result['commit']}.json"
    out = out or path
    measure.write_json(out, result)
    if out != path:
        path.unlink()
    return out


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--no-build", action="store_true", help="do not install fastenc first")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds

    import torch

    from bench import measure
    from bench.gpu_record import budget

    has_gpu = torch.cuda.is_available()
    shares = dict(SHARES)
    if options.no_build or not has_gpu:
        del shares["build"]
    if options.no_tests:
        del shares["gpu tests"], shares["cpu tests"]

    def left() -> float:
        return end - time.monotonic()

    result: dict[str, object] = {}
    path = options.out or (ROOT / "build" if has_gpu else Path(tempfile.mkdtemp())) / "gpu.json"
    path.unlink(missing_ok=True)
    steps = {
        "build": build,
        "gpu tests": lambda seconds: gpu_tests(seconds, has_gpu),
        "cpu tests": lambda seconds: cpu_tests(seconds, has_gpu),
    }
    print(f"until it is done: {path}", flush=True)
    for name in shares:
        if name in steps:
            try:
                result[name] = steps[name](budget(name, shares, left()))
            except Exception as error:
                result[name] = {"status": f"{type(error).__name__}: {error}"}
            print(f"{name}: {result[name]['status']}", flush=True)
            measure.write_json(path, result, indent=None)
    measure_all(path, left)
    path = finish(path, options.out)
    print(path)
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending what runs
    main()
