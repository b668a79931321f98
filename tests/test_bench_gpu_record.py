"""The record of the GPU benchmark: what fails, hangs or kills the process costs its own run, and
the file says so."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch

from bench import gpu, gpu_gliner, gpu_ops, gpu_peers, gpu_record, gpu_steps
from bench.gpu_record import LOST, STEPS, Record, budget, load


def refuse(*_):
    raise ValueError("this one fails")


def fine(found):
    found["seconds"] = 1.0


@pytest.fixture
def record(tmp_path):
    record = Record(tmp_path / "gpu.json", {"ceilings": {"copy": 1.0, "matrix_bf16": 1.0}})
    record.deadline = gpu_record.Deadline(1000)
    return record


# ---- a run, a step -------------------------------------------------------------------------------


def test_a_run_that_raises_costs_itself(record):
    row = record.row("ops", op="geglu", shape="1", direction="forward")
    assert record.row("ops", op="geglu", shape="1", direction="forward") is row

    def half(found):
        found["seconds"] = 2.0
        refuse()

    for name, call in (("fastenc cuda", refuse), ("half", half), ("torch", fine)):
        record.run(row, name, call)
    error = "ValueError: this one fails"
    assert load(record.path)["ops"] == [
        {"op": "geglu", "shape": "1", "direction": "forward", "runs": {
            "fastenc cuda": {"error": error}, "half": {"seconds": 2.0, "error": error},
            "torch": {"seconds": 1.0},
        }}
    ]  # fmt: skip


def test_the_file_says_what_is_running(record):
    row = record.row("ops", op="rope", shape="1")

    def call(found):
        running = load(record.path)
        found["marked"] = running["ops"][0]["runs"]["torch"]["error"]
        found["running"] = running["running"]["name"]

    record.run(row, "torch", call)
    run = load(record.path)["ops"][0]["runs"]["torch"]
    assert run == {"marked": "the process ended during this run", "running": "torch"}


def test_a_step_that_raises_is_recorded_and_the_next_one_runs(record):
    def second(record):
        record.run(record.row("b", model="x", shape="1"), "torch", fine)

    record.step("first", 10, refuse)
    record.step("second", 10, second)
    result = load(record.path)
    assert result["step_errors"] == {"first": "ValueError: this one fails"}
    assert result["step_seconds"].keys() == {"first", "second"}
    assert result["b"][0]["runs"] == {"torch": {"seconds": 1.0}}


def test_what_is_recorded_is_not_run_again(record):
    record.step("first", 10, lambda r: r.run(r.row("a", op="x", shape="1"), "torch", fine))
    again = Record(record.path, load(record.path))
    again.deadline = gpu_record.Deadline(10)
    again.step("first", 10, refuse)
    again.run(again.row("a", op="x", shape="1"), "torch", refuse)
    assert again.result["step_errors"] == {}
    assert again.result["a"][0]["runs"] == {"torch": {"seconds": 1.0}}


def test_past_its_time_a_row_says_so(record):
    record.deadline = gpu_record.Deadline(0)
    row = record.row("ops", op="geglu", shape="1")
    record.run(row, "torch", fine)
    assert row["runs"] == {"torch": {"error": "out of time"}}


def test_a_lost_context_ends_the_process_with_its_rows_written(record, monkeypatch):
    monkeypatch.setattr(gpu_record, "context_is_lost", lambda: True)
    monkeypatch.setattr(gpu_record.os, "_exit", sys.exit)
    row = record.row("ops", op="geglu", shape="1")
    record.run(row, "torch", fine)  # nobody asks after a run that is well
    with pytest.raises(SystemExit) as left:
        record.run(row, "fastenc cuda", refuse)
    result = load(record.path)
    assert left.value.code == LOST and result["running"] is None
    assert result["ops"][0]["runs"]["torch"] == {"seconds": 1.0}
    assert result["lost"][0]["name"] == "fastenc cuda"
    # A second shape may try; after that the kernel has had its chances.
    with pytest.raises(SystemExit):
        record.run(record.row("ops", op="geglu", shape="2"), "fastenc cuda", refuse)
    third = record.row("ops", op="geglu", shape="3")
    record.run(third, "fastenc cuda", refuse)
    record.run(third, "torch", fine)
    assert third["runs"]["fastenc cuda"]["error"].startswith("left out: died: ValueError")
    assert third["runs"]["torch"] == {"seconds": 1.0}


# ---- the measuring process and its successors ----------------------------------------------------

DEADLY = """
    import os, sys, time
    from pathlib import Path
    from bench import gpu_record
    from bench.gpu_record import Record, load

    gpu_record.LIMIT = 1.0
    fine = lambda found: found.update(seconds=1.0)
    deeds = {
        "hang": lambda found: time.sleep(60),
        "kill": lambda found: os.kill(os.getpid(), 9),
        "lose": lambda found: 1 / 0,
    }

    def ops(record):
        for shape in "123":
            for op, deed in deeds.items():
                row = record.row("ops", op=op, shape=shape)
                record.run(row, "torch", fine)
                if op == "lose" and shape == "1":
                    gpu_record.context_is_lost = lambda: True
                record.run(row, "fastenc cuda", deed if shape == "1" else fine)
                gpu_record.context_is_lost = lambda: False

    def models(record):
        if "dead" not in record.result:
            record.result["dead"] = True
            record.write()
            os._exit(7)

    path = Path(sys.argv[1])
    record = Record(path, load(path))
    record.step("ops", 100, ops)
    record.step("models", 100, models)
    record.step(
        "training", 100, lambda r: r.run(r.row("training", model="x", shape="1"), "a", fine)
    )
    record.result.pop("running")
    record.write()
"""


def test_behind_a_dead_process_the_next_one_goes_on(tmp_path, monkeypatch):
    script = tmp_path / "deadly.py"
    script.write_text(textwrap.dedent(DEADLY))
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    monkeypatch.setattr(
        gpu, "measuring_command", lambda path, seconds: [sys.executable, str(script), str(path)]
    )
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"build": {"status": 0}}))
    gpu.measure_all(path, lambda: 300.0)
    result = load(path)
    assert [end["status"] for end in result["processes"]] == [1, -9, LOST, 7, 0]
    assert result["build"] == {"status": 0}
    runs = {(row["op"], row["shape"]): row["runs"] for row in result["ops"]}
    assert all(of["torch"] == {"seconds": 1.0} for of in runs.values()) and len(runs) == 9
    ours = {key: of["fastenc cuda"] for key, of in runs.items()}
    assert ours["hang", "1"] == {"error": "hung for 1 s"}
    assert ours["hang", "2"] == {"error": "left out: hung for 1 s, at 1"}
    assert ours["kill", "1"]["error"].startswith("died: exit status -9")
    assert ours["lose", "1"] == {"error": "ZeroDivisionError: division by zero"}
    for op in ("kill", "lose"):  # one more chance
        assert ours[op, "2"] == ours[op, "3"] == {"seconds": 1.0}
    assert result["step_errors"]["models"].startswith("died: exit status 7")
    assert result["training"][0]["runs"] == {"a": {"seconds": 1.0}}
    assert "running" not in result


def test_a_process_that_cannot_begin_is_not_started_again(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import no_such_module"]
    monkeypatch.setattr(gpu, "measuring_command", lambda path, seconds: command)
    path = tmp_path / "gpu.json"
    gpu.measure_all(path, lambda: 100.0)
    (end,) = load(path)["processes"]
    assert end["status"] == 1 and "no_such_module" in end["output"]


def test_the_time_is_up_during_a_run(tmp_path, monkeypatch):
    script = tmp_path / "deadly.py"
    script.write_text(textwrap.dedent(DEADLY).replace("LIMIT = 1.0", "LIMIT = 1000.0"))
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    monkeypatch.setattr(
        gpu, "measuring_command", lambda path, seconds: [sys.executable, str(script), str(path)]
    )
    path = tmp_path / "gpu.json"
    gpu.measure_all(path, lambda: 20.0)
    path = gpu.finish(path, path)
    result = load(path)
    assert [end["status"] for end in result["processes"]] == ["out of time"]
    runs = result["ops"][0]["runs"]
    assert runs == {
        "torch": {"seconds": 1.0}, "fastenc cuda": {"error": "out of time while it ran"}
    }  # fmt: skip
    assert result["step_errors"] == dict.fromkeys(STEPS, "not reached, or cut short")


# ---- order ---------------------------------------------------------------------------------------


def test_time_that_is_left_is_handed_on():
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert budget("a", shares, 100) == 50
    assert budget("b", shares, 90) == pytest.approx(54)  # "a" took 10 of its 50
    assert budget("c", shares, 30) == 30
    assert sum(share for share, _, _ in STEPS.values()) == pytest.approx(1)


def test_ours_and_quick_peers_of_everything_come_before_what_is_compiled():
    compiled = [options == gpu_record.COMPILE_LAST for _, _, options in STEPS.values()]
    assert compiled == sorted(compiled) and any(compiled)


def test_what_was_out_of_time_is_run_in_what_is_left(tmp_path, monkeypatch):
    order = []

    def step(module, options, record):
        order.append((record.name, module, bool(options)))
        if module == "gpu_models" and not options:
            if record.name == "models":
                record.deadline = gpu_record.Deadline(0)
            for shape in "12":
                record.run(record.row("models", model="x", shape=shape), "fastenc", fine)
        if module == "gpu_ops" and not options:
            record.run(record.row("ops", op="x", shape="1"), "fastenc", fine if first else refuse)

    first = True
    monkeypatch.setattr(gpu_steps, "step", step)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"step_seconds": {"stamp": 1.0}, "ceilings": {}}))
    gpu_steps.main(path, 100)
    names = [name for name, _, _ in order]
    assert names == [*STEPS, *(f"{name}, again" for name in STEPS)]
    result = load(path)
    assert [row["runs"] for row in result["models"]] == [{"fastenc": {"seconds": 1.0}}] * 2
    order.clear()
    first = False
    gpu_steps.main(path, 100)
    assert order == [] and load(path)["ops"][0]["runs"] == {"fastenc": {"seconds": 1.0}}


def test_every_row_in_turn_and_one_that_cannot_be_made_costs_itself(record, monkeypatch):
    order = []

    def rows():
        for shape in ("1", "2"):

            def make(shape=shape):
                if shape == "1":
                    raise MemoryError("too large")
                x = torch.ones(2, requires_grad=True)
                return (x,), (x,)

            def run(name, shape=shape):
                def factory():
                    order.append((name, shape))
                    return lambda x: 2 * x

                return factory

            names = ("FlexAttention", "torch", "fastenc cuda")
            yield gpu_ops.Row("geglu", shape, make, {n: run(n) for n in names}, (1, 1))  # fmt: skip

    def broken():
        yield from rows()
        refuse()

    monkeypatch.setattr(gpu_ops, "families", lambda: (broken, rows))
    monkeypatch.setattr(gpu_ops, "cold_copies", lambda moved: 1)
    record.name = "ops"
    gpu_ops.measure(record)
    quick = [("fastenc cuda", "1"), ("fastenc cuda", "2")] * 2 + [
        ("torch", "1"),
        ("torch", "2"),
    ] * 2
    assert order == quick
    gpu_ops.measure(record, **gpu_record.COMPILE_LAST)
    assert order == quick + [("FlexAttention", "1"), ("FlexAttention", "2")] * 2
    assert record.result["step_errors"] == {"ops, broken": "ValueError: this one fails"}
    for row in record.result["ops"]:
        assert row["runs"].keys() == {"fastenc cuda", "torch", "FlexAttention"}
        for run in row["runs"].values():
            if row["shape"] == "1":
                assert run == {"error": "MemoryError: too large"}
            else:
                assert run["seconds"] > 0


def test_each_compiled_row_starts_with_empty_caches(record, monkeypatch):
    """Past eight shapes of one function dynamo compiles no more, and runs it eagerly instead."""
    calls = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append(1))
    row = next(gpu_ops.geglu_rows())
    monkeypatch.setattr(gpu_peers, "compiled", lambda fn: fn)
    gpu_ops.measure_row(record, row, False, ("peers",))
    assert not calls
    gpu_ops.measure_row(record, row, False, ("compiled",))
    gpu_ops.measure_row(record, row, True, ("compiled",))
    assert len(calls) == 2


def test_a_backend_that_does_not_serve_says_why(record, monkeypatch):
    monkeypatch.setattr(
        gpu_ops.fastenc, "backends", lambda: {"geglu": {"cuda": "no nvcc", "triton": "no GPU"}}
    )
    gpu_ops.measure_row(record, next(gpu_ops.geglu_rows()), False, ("fastenc",))
    (row,) = record.result["ops"]
    assert row["runs"] == {
        "fastenc cuda": {"error": "NotImplementedError: no nvcc"},
        "fastenc triton": {"error": "NotImplementedError: no GPU"},
    }


def test_nothing_is_measured_where_triton_is_not_installed(tmp_path, monkeypatch):
    reason = "there is no Triton kernel for this op"
    monkeypatch.setattr(
        gpu_steps.fastenc, "backends", lambda: {"geglu": {"triton": reason, "cuda": "available"}}
    )
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"build": {"status": 1}}))
    gpu_steps.main(path, 100)
    result = load(path)
    assert result["build"] == {"status": 1} and "ops" not in result
    assert result["step_errors"]["stamp"] == f"RuntimeError: Triton serves no op here: {reason}"


def test_the_compiled_gliner_peer_runs_what_was_compiled(monkeypatch):
    ran = []

    def compile(module):
        def run(*args):
            ran.append(1)
            return module(*args)

        compiled = torch.nn.Module()
        compiled.forward = run
        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    bench = gpu_gliner.Bench(gpu_gliner.TOY)
    with torch.inference_mode():
        eager, compiled = bench.theirs(), bench.theirs(compiled=True)
        expected = eager()
        assert not ran
        for _ in range(2):
            torch.testing.assert_close(compiled(), expected)
    assert len(ran) == 2
