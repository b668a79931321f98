"""Gates: every GPU configuration compiled without a GPU and judged; make test takes "not slow".

Kernels are compiled in a folder of their own, or known from readings/ (see record.py); the table of
all of them ends the report.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

lines: list[str] = []


def pytest_collection_modifyitems(config, items):
    if not INTERPRETED:
        return
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET=1 compiles nothing"))


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(tmp_path_factory):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def report():
    """``report(kernels)`` adds them to the table at the end."""
    from compiling import line_of

    return lambda kernels: lines.extend(map(line_of, kernels))


def pytest_sessionfinish(session):
    sent = getattr(session.config, "workeroutput", None)  # of a process of pytest-xdist
    if sent is not None:
        sent["compiled"] = lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    lines.extend(getattr(node, "workeroutput", {}).get("compiled", ()))


def pytest_terminal_summary(terminalreporter):
    if not lines:
        return
    from compiling import table

    terminalreporter.section("compiled kernels")
    terminalreporter.write_line(table(lines))
