"""pytest's plugin for ``python -m bench.gpu``, where minutes count: what comes first, what is left
out, an end for what hangs, and a note of each test in the file that FASTENC_TEST_NOTES names.

``pytest -m gpu`` without it runs everything in pytest's order.
"""

from __future__ import annotations

import faulthandler
import json
import os

import pytest

from bench.gpu_timing import context_is_lost

STDERR, LEFT_OUT = pytest.StashKey[int](), pytest.StashKey[int]()
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")


def pytest_addoption(parser):
    group = parser.getgroup("bench.gpu")
    group.addoption(
        "--thin-triton", action="store_true", help="each parity case on Triton in one dtype only"
    )
    group.addoption(
        "--each-test", type=float, default=0, metavar="SECONDS", help="end the process past that"
    )


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)  # not captured yet
    if not WORKER and (path := os.environ.get("FASTENC_TEST_NOTES")):
        config.pluginmanager.register(Notes(path))


# ---- what runs, in which order -------------------------------------------------------------------


def on_triton(item) -> bool:
    return "triton" in item.name


def left_out(items) -> list:
    """Parity tests on Triton but for one dtype a case; the dtypes take turns."""
    names: dict[str, dict[str, int]] = {"case": {}, "dtype": {}}
    found = []
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None or given.params.get("backend") != "triton" or "case" not in given.params:
            continue
        case, dtype = (
            names[key].setdefault(str(given.params[key]), len(names[key])) for key in names
        )
        # Cases repeat their options every two or three: the turns are shifted against those.
        if dtype != (case + case // 3) % 3:
            found.append(item)
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=on_triton)  # the CUDA library, which a GPU uses by default, comes first
    if config.getoption("--thin-triton"):
        out = {id(item) for item in left_out(items)}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in out])
        items[:] = [item for item in items if id(item) not in out]
        config.stash[LEFT_OUT] = len(out)


# ---- what takes the process with it --------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if seconds := item.config.getoption("--each-test"):
        faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # xdist blames this test for the end of its worker, and starts another for the rest.
    if WORKER and report.failed and context_is_lost():
        os.write(item.config.stash[STDERR], f"{item.nodeid}: {report.longreprtext}\n".encode())
        os._exit(1)
    return report


# ---- notes ---------------------------------------------------------------------------------------


def pytest_collection_finish(session):
    if WORKER in ("", "gw0") and (path := os.environ.get("FASTENC_TEST_NOTES")) and session.items:
        out = session.config.stash.get(LEFT_OUT, 0)
        write(path, {"collected": len(session.items) + out, "left out": out})


def write(path: str, note: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(note) + "\n")


class Notes:
    """A line for each test that has ended, and for each file that could not be collected."""

    def __init__(self, path: str):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.note(report, report.outcome)

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(report, "not collected")

    def note(self, report, outcome: str) -> None:
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else report.longreprtext[-400:]
        write(self.path, {"test": report.nodeid, "outcome": outcome, "why": why[:400]})
