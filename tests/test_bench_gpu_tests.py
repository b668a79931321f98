"""The pytest plugin of the GPU benchmark: order, what is left out, hangs, and the notes."""

from __future__ import annotations

import importlib.util
import os
import types

import pytest

from bench import gpu, pytest_gpu

MODULE = """
    import os, time, pytest

    @pytest.mark.parametrize("case", ["a"])
    @pytest.mark.parametrize("dtype", ["half", "float"])
    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_parity(backend, dtype, case):
        with open(os.environ["ORDER"], "a") as file:
            file.write(f"{backend} {dtype}\\n")

    def test_fails():
        assert 1 == 2, "not equal"

    def test_skips():
        pytest.skip("not here")
"""
HANGS = """
    def test_first():
        pass

    def test_hangs():
        import time
        time.sleep(120)

    def test_last():
        pass
"""
LOST = """
    from bench import pytest_gpu

    def test_first():
        pass

    def test_loses_the_context():
        pytest_gpu.context_is_lost = lambda: True  # of this process
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def test_last():
        assert not pytest_gpu.context_is_lost()
"""
needs_xdist = pytest.mark.skipif(
    importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run_tests on files made of the given sources."""
    import textwrap

    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # of the process that runs this test

    def run(sources: dict[str, str], *options: str) -> dict:
        for name, source in sources.items():
            (tmp_path / name).write_text(textwrap.dedent(source))
        files = [str(tmp_path / name) for name in sources]
        return gpu.run_tests(files, 100, "-p", "no:cacheprovider", *options)

    return run


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "1"], marks=needs_xdist)])
def test_order_and_notes(run, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(gpu, "workers", lambda: workers)
    done = run({"test_a.py": MODULE, "test_b.py": "import no_such_module"}, "--thin-triton")
    order = (tmp_path / "order").read_text().splitlines()
    assert order == ["cuda half", "cuda float", "triton half"]
    assert done["status"] == 1, done["output"]
    assert (done["collected"], done["left out"], done["ran"], done["not reached"]) == (6, 1, 4, 0)
    assert done["outcomes"] == {"passed": 3, "failed": 1, "skipped": 1, "not collected": 1}
    (failed, why), (broken, reason) = sorted(done["failures"].items())
    assert failed.endswith("test_a.py::test_fails") and "not equal" in why
    assert broken.endswith("test_b.py") and "no_such_module" in reason
    assert done["skipped"] == {"not here": 1}


def test_a_test_that_hangs_is_ended(run, monkeypatch):
    monkeypatch.setattr(gpu, "workers", list)
    monkeypatch.setattr(gpu, "TEST_SECONDS", 2)
    done = run({"test_a.py": HANGS})
    assert done["status"] == 1 and "Timeout (" in done["output"] and done["seconds"] < 60
    assert (done["collected"], done["ran"], done["not reached"]) == (3, 1, 2)


@needs_xdist
def test_a_test_that_hangs_costs_itself(run, monkeypatch):
    monkeypatch.setattr(gpu, "workers", lambda: ["-n", "1"])
    monkeypatch.setattr(gpu, "TEST_SECONDS", 3)
    done = run({"test_a.py": HANGS})
    assert done["outcomes"] == {"passed": 2, "failed": 1}, done
    assert "crashed" in next(iter(done["failures"].values()))


@needs_xdist
def test_a_lost_context_costs_one_test(run, monkeypatch):
    monkeypatch.setattr(gpu, "workers", lambda: ["-n", "1"])
    done = run({"test_a.py": LOST})
    assert done["outcomes"] == {"passed": 2, "failed": 1}, done
    assert next(iter(done["failures"])).endswith("test_loses_the_context")
    assert "illegal memory access" in done["output"]


def parity_items(cases: int) -> list:
    from fastenc.testing import DTYPES

    return [
        types.SimpleNamespace(
            callspec=types.SimpleNamespace(params={"backend": b, "dtype": d, "case": f"case {c}"})
        )
        for b in ("triton", "cuda") for d in DTYPES for c in range(cases)
    ]  # fmt: skip


def test_each_case_on_triton_in_one_dtype():
    items = [*parity_items(18), types.SimpleNamespace(name="test_other")]
    out = pytest_gpu.left_out(items)
    kept = [i.callspec.params for i in items[:-1] if not any(i is x for x in out)]
    assert len(out) == 2 * 18 and all(x.callspec.params["backend"] == "triton" for x in out)
    assert sum(x["backend"] == "cuda" for x in kept) == 3 * 18
    chosen = {x["case"]: x["dtype"] for x in kept if x["backend"] == "triton"}
    assert len(chosen) == 18
    for period in (2, 3):  # options that alternate meet every dtype
        for start in range(period):
            assert len({chosen[f"case {c}"] for c in range(start, 18, period)}) == 3


def test_the_thin_grid_of_the_real_tests():
    """Each parity case of test_gpu_ops.py is on Triton once, and on the CUDA library as often as
    there are dtypes."""
    from fastenc import testing
    from tests import test_gpu_ops

    cases = [c for op in test_gpu_ops.OPS for c in testing.cases(op)]
    assert len({str(c) for c in cases}) == len(cases)
    items = [
        types.SimpleNamespace(
            callspec=types.SimpleNamespace(params={"backend": b, "dtype": d, "case": c})
        )
        for b in test_gpu_ops.BACKENDS for d in testing.DTYPES for c in cases
    ]  # fmt: skip
    kept = len(items) - len(pytest_gpu.left_out(items))
    assert kept == len(cases) * (1 + len(testing.DTYPES))
