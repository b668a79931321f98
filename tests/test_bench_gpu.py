"""``python -m bench.gpu``: its commands, their end, and its parts in order, with stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from bench import gpu, gpu_process, measure
from bench.gpu_record import STEPS, load

PYTHON = sys.executable


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- commands ------------------------------------------------------------------------------------


def test_a_command_and_its_end():
    done = gpu_process.run([PYTHON, "-c", "import sys; print('out'); sys.exit(3)"], 60)
    assert done["status"] == 3 and done["output"] == "out\n"
    assert done["command"].startswith("python -c ")
    assert gpu_process.run(["sh", "-c", "echo $WORD"], 60, WORD="said")["output"] == "said\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_past_its_time_a_command_leaves_no_process(tmp_path):
    """A compiler in the command's group that ignores SIGTERM, and, as ninja has them, one in a
    group of its own, which its parent ends when it is told to."""
    script = tmp_path / "build.py"
    script.write_text(
        textwrap.dedent("""
        import os, pathlib, signal, subprocess, sys, time
        stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"
        ours = subprocess.Popen([sys.executable, "-c", stubborn])
        apart = subprocess.Popen(["sleep", "300"], start_new_session=True)

        def told(*_):
            apart.terminate()
            sys.exit(1)

        signal.signal(signal.SIGTERM, told)
        pathlib.Path(sys.argv[1]).write_text(f"{ours.pid} {apart.pid}")
        time.sleep(300)
    """)
    )
    start = time.monotonic()
    done = gpu_process.run([PYTHON, str(script), str(tmp_path / "pids")], 5)
    assert done["status"] == "out of time" and time.monotonic() - start < 60
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_an_install_that_fails_is_made_again_without_cuda(monkeypatch):
    calls = []

    def run(command, seconds, **environment):
        calls.append((command[1:], seconds, environment))
        return {"status": status}

    monkeypatch.setattr(gpu, "run", run)
    for status in (1, "out of time"):
        calls.clear()
        done = gpu.build(100)
        assert done == {"status": status, "without CUDA": {"status": status}}
        assert [environment for _, _, environment in calls] == [{}, {"FASTENC_CUDA": "0"}]
        assert calls[0][0][-2:] == calls[1][0][-2:] == ["-e", "."] and calls[1][1] >= 50
    status = 0
    assert gpu.build(100) == {"status": 0}


def test_the_measuring_process_is_a_new_interpreter_that_reads_the_file(tmp_path):
    """What pip has installed is found by interpreters that start later."""
    path = tmp_path / "gpu.json"
    command = gpu.measuring_command(path, 12.34)
    assert command == [PYTHON, "-m", "bench.gpu_steps", str(path), "--seconds", "12.3"]
    done = subprocess.run([*command[:3], "--help"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--seconds" in done.stdout


# ---- the whole -----------------------------------------------------------------------------------


def run_all(monkeypatch, tmp_path, measured, **parts):
    """gpu.main on a machine with a stand-in for its GPU: the order of its parts, and the file."""
    import torch

    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("build", "gpu_tests", "cpu_tests"):

        def part(seconds, *_, name=name):
            order.append((name, seconds))
            return parts[name]() if name in parts else {"status": 0}

        monkeypatch.setattr(gpu, name, part)

    def measure_all(path, left):
        order.append(("measuring", left()))
        result = load(path)
        assert {"build", "gpu tests", "cpu tests"} <= result.keys()
        measure.write_json(path, {**result, **measured})

    monkeypatch.setattr(gpu, "measure_all", measure_all)
    path = gpu.main(["--out", str(tmp_path / "x.json"), "--seconds", "1000"])
    return order, json.loads(path.read_text())


def test_parts_in_order_with_their_time(monkeypatch, tmp_path):
    done = {"step_seconds": dict.fromkeys(STEPS, 1.0), "step_errors": {}}
    order, result = run_all(monkeypatch, tmp_path, done)
    seconds = dict(order)
    assert [*seconds] == ["build", "gpu_tests", "cpu_tests", "measuring"]
    assert 225 < seconds["build"] <= 230
    assert 320 < seconds["gpu_tests"] <= 1000 * 25 / 77  # of what the build has left
    assert 900 < seconds["measuring"] <= 1000
    assert result["step_errors"] == {}


def test_a_part_that_raises_costs_itself(monkeypatch, tmp_path):
    def fail():
        raise OSError("no such file")

    order, result = run_all(monkeypatch, tmp_path, {}, gpu_tests=fail)
    assert len(order) == 4
    assert result["gpu tests"] == {"status": "OSError: no such file"}
    assert result["step_errors"] == dict.fromkeys(STEPS, "not reached, or cut short")


def test_the_file_gets_its_name_at_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    result = {"machine": {"name": "h200", "gpu": "NVIDIA H200"}, "date": "d", "commit": "c"}
    path = tmp_path / "gpu.json"
    measure.write_json(path, result)
    assert gpu.finish(path, None) == tmp_path / "results/h200/d-c.json"
    assert not path.exists()
    measure.write_json(path, {"build": {}})  # no process began
    assert gpu.finish(path, None) == path


# ---- tests ---------------------------------------------------------------------------------------


def test_workers(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.workers() == []
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    assert gpu.workers()[:2] == ["-n", "12"]


def test_what_ran_of_how_many(monkeypatch):
    notes = [
        {"collected": 7, "left out": 2},
        {"test": "a", "outcome": "passed", "why": ""},
        {"test": "b", "outcome": "failed", "why": "wrong"},
        {"test": "d", "outcome": "skipped", "why": "no backend"},
        {"test": "file.py", "outcome": "not collected", "why": "no module"},
    ]
    assert gpu.summary("\n".join(map(json.dumps, notes))) == {
        "collected": 7, "ran": 2, "left out": 2, "not reached": 2,
        "outcomes": {"passed": 1, "failed": 1, "skipped": 1, "not collected": 1},
        "failures": {"b": "wrong", "file.py": "no module"}, "skipped": {"no backend": 1},
    }  # fmt: skip
    assert gpu.summary("")["collected"] == 0
