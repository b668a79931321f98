"""What setup.py decides of the CUDA library: FASTENC_CUDA, FASTENC_CUDA_ARCHS, and its one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_sass
import pytest


@pytest.fixture(scope="module")
def build():
    return cuda_sass.setup_script()


def write_nvcc(folder: Path, release: str) -> str:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def toolkit(tmp_path):
    return write_nvcc(tmp_path, "12.5")


def test_nvcc_decides(build, toolkit, tmp_path):
    path = {"PATH": os.path.dirname(toolkit)}
    assert build.choose_cuda(path)[0] == toolkit
    assert build.choose_cuda({"PATH": "", "CUDA_HOME": str(tmp_path)})[0] == toolkit
    assert build.choose_cuda({**path, "FASTENC_CUDA": "1"})[0] == toolkit
    nvcc, line = build.choose_cuda({"PATH": ""})
    assert nvcc is None and line == "fastenc: the CUDA library is not built (nvcc was not found)"


def test_fastenc_cuda_forces(build, toolkit):
    path = {"PATH": os.path.dirname(toolkit)}
    assert build.choose_cuda({**path, "FASTENC_CUDA": "0"})[0] is None
    with pytest.raises(SystemExit, match="nvcc was not found"):
        build.choose_cuda({"PATH": "", "FASTENC_CUDA": "1"})
    with pytest.raises(SystemExit, match="expected 0, 1 or nothing, got 'yes'"):
        build.choose_cuda({**path, "FASTENC_CUDA": "yes"})


def test_a_toolkit_that_is_too_old_does_not_break_the_install(build, toolkit, tmp_path):
    path = {"PATH": os.path.dirname(toolkit)}
    write_nvcc(tmp_path, "12.4")
    nvcc, line = build.choose_cuda(path)
    assert nvcc is None and f"nvcc 12.5 or later is needed, {toolkit} is 12.4" in line
    with pytest.raises(SystemExit, match=r"FASTENC_CUDA=1, but nvcc 12\.5 or later is needed"):
        build.choose_cuda({**path, "FASTENC_CUDA": "1"})


def test_without_sources_there_is_nothing_to_build(build, toolkit, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", str(tmp_path))
    path = {"PATH": os.path.dirname(toolkit)}
    nvcc, line = build.choose_cuda(path)
    assert nvcc is None
    assert line == "fastenc: the CUDA library is not built (no sources in csrc/cuda)"
    with pytest.raises(SystemExit, match="FASTENC_CUDA=1, but no sources in csrc/cuda"):
        build.choose_cuda({**path, "FASTENC_CUDA": "1"})


def test_architectures(build):
    assert build.cuda_archs({}) == ["80", "90a"]
    assert build.gencode(["80", "90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert build.cuda_archs({"FASTENC_CUDA_ARCHS": "120, 89"}) == ["120", "89"]
    assert build.gencode(["120", "89"])[-1] == "-gencode=arch=compute_89,code=compute_89"
    assert build.gencode(["90a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]
    for wrong in ("75", "sm_80", "80;hopper"):
        with pytest.raises(SystemExit, match="FASTENC_CUDA_ARCHS: expected 80 or later"):
            build.cuda_archs({"FASTENC_CUDA_ARCHS": wrong})


def test_every_source_is_in_one_unit(build):
    sources = [str(path) for path in cuda_sass.ROOT.glob("csrc/cuda/*.cu")]
    units = build.units(sources)
    assert sorted(path for unit in units.values() for path in unit) == sorted(sources)
    for name, stems in build.UNITS.items():
        assert {Path(path).stem for path in units[name]} == set(stems)
    assert build.units(sources[:1]).popitem()[1] == sources[:1]


def test_a_unit_is_compiled_again_if_one_of_its_sources_changed(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {tmp_path}/x.o\necho compiled >> {tmp_path}/calls\n")
    nvcc.chmod(0o755)
    sources = [tmp_path / "a.cu", tmp_path / "b.cu"]
    for source in sources:
        source.write_text('#include "shared.h"\n')
    shared = tmp_path / "shared.h"
    shared.touch()

    inner = tmp_path / "inner.h"
    shared.write_text('#include "inner.h"\n')
    inner.touch()

    def calls(*flags) -> int:
        build.compile_cuda(str(nvcc), "x", [str(s) for s in sources], str(tmp_path), list(flags))
        return (tmp_path / "calls").read_text().count("compiled")

    assert (calls(), calls()) == (1, 1)
    assert (tmp_path / "x.cu").read_text() == '#include "a.cu"\n#include "b.cu"\n'
    for i, changed in enumerate((*sources, shared, inner)):
        with open(changed, "a") as file:
            file.write("// changed\n")
        assert (calls(), calls()) == (i + 2, i + 2)
    assert (calls("-O1"), calls("-O1"), calls("-O2")) == (6, 6, 7)


def test_a_unit_that_does_not_compile_stops_the_build_each_time(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {tmp_path}/x.o\necho no such thing\nexit 2\n")
    nvcc.chmod(0o755)
    (tmp_path / "a.cu").touch()
    for _ in range(2):
        with pytest.raises(SystemExit, match="no such thing"):
            build.compile_cuda(str(nvcc), "x", [str(tmp_path / "a.cu")], str(tmp_path), [])
    assert (tmp_path / "x.log").read_text() == "no such thing\n"


def test_one_line_says_what_is_built():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=cuda_sass.ROOT, env={**os.environ, "FASTENC_CUDA": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "fastenc: the CUDA library is not built (FASTENC_CUDA=0)"
    )
