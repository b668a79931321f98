"""What setup.py decides of the CUDA library: FASTENC_CUDA, FASTENC_CUDA_ARCHS, and its one line."""

from __future__ import annotations

import os
import subprocess
import sys

import cuda_sass
import pytest


@pytest.fixture(scope="module")
def build():
    return cuda_sass.setup_script()


@pytest.fixture
def toolkit(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    return str(nvcc)


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


def test_one_line_says_what_is_built():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=cuda_sass.ROOT, env={**os.environ, "FASTENC_CUDA": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "fastenc: the CUDA library is not built (FASTENC_CUDA=0)"
    )
