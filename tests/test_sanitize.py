"""bench.sanitize: the command it makes, what it says where it cannot run, and its calls."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastenc
from bench import sanitize

# Stands in for compute-sanitizer: notes its arguments, and finds something under racecheck.
FAKE = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$0.log"
case "$1" in *racecheck) exit 9;; esac
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text(FAKE)
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return path


def test_the_tool_is_found_in_the_toolkit(fake):
    assert sanitize.find_tool({"PATH": str(fake.parent)}) == str(fake)
    assert sanitize.find_tool({"PATH": "", "CUDA_HOME": str(fake.parents[1])}) == str(fake)
    assert sanitize.find_tool({"PATH": ""}) is None


def test_the_command(monkeypatch, fake, capfd):
    monkeypatch.setattr(sanitize, "why_not", lambda tool: None)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    with pytest.raises(sanitize.typer.Exit) as left:
        sanitize.main(tool="memcheck,racecheck")
    assert left.value.exit_code == 1
    assert capfd.readouterr().err == "bench.sanitize: racecheck failed\n"
    common = (
        "--error-exitcode=9 --target-processes=all --kernel-name kernel_substring=fastenc "
        f"{sys.executable} -m bench.sanitize --calls"
    )
    lines = (fake.parent / "compute-sanitizer.log").read_text().splitlines()
    assert lines == [f"1 --tool={tool} {common}" for tool in sanitize.TOOLS]


def test_a_clean_run_exits_with_0(monkeypatch, fake):
    monkeypatch.setattr(sanitize, "why_not", lambda tool: None)
    sanitize.main(tool="memcheck")


def test_it_says_why_it_cannot_run(monkeypatch):
    assert sanitize.why_not(None).startswith("compute-sanitizer was not found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.why_not("/bin/true") == "no GPU is available"
    done = subprocess.run(
        [sys.executable, "-m", "bench.sanitize"],
        cwd=sanitize.ROOT, capture_output=True, text=True,
        env={"PATH": "", "HOME": "/", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("bench.sanitize: compute-sanitizer was not found")


def test_every_op_of_the_library_is_called():
    made = sanitize.call_all("reference", "cpu", each=1)
    on_cpus_alone = {
        "add_layer_norm_inplace", "dropout", "linear", "linear_geglu", "rope_varlen_attention_into",
    }  # fmt: skip
    assert set(made) == set(fastenc.backends()) - on_cpus_alone
    assert set(made.values()) == {len(sanitize.testing.DTYPES)}


@pytest.mark.parametrize("op", ["varlen_attention", "span_score"])
def test_the_cases_are_small(op):
    cases = list(sanitize.small_cases(op, 3))
    assert len(cases) == 3 and len({case.name for case in cases}) == 3
