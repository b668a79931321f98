"""The package: what the wheel holds, which symbols the library needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastenc

ROOT = Path(__file__).parent.parent


def test_the_library_needs_only_the_stable_abi():
    from fastenc import _C

    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout.split()
    torch_symbols = [s for s in symbols if re.search(r"c10|3at|caffe2|5torch", s)]
    assert torch_symbols == []
    assert any(s.startswith("aoti_torch_") for s in symbols)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the tracked files, without the compiled library (built above already)."""
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--", "fastenc", "triton_kernels", "setup.py", "pyproject.toml",
         "README.md", "LICENSE", "csrc/host"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "csrc/common", source / "csrc/common")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(out), str(source)],
        check=True, env={**os.environ, "FASTENC_CUDA": "0", "MAX_JOBS": "2"},
    )  # fmt: skip
    return next(out.glob("fastenc-*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastenc"}
    assert "fastenc/triton_kernels/__init__.py" in names
    assert "fastenc/py.typed" in names
    assert any(re.match(r"fastenc/_C\..*", name) for name in names)
    assert not any(name.endswith((".cpp", ".cu")) for name in names)


def test_version():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fastenc.__version__}"' in text
