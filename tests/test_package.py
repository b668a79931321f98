"""The package: what the sdist and the wheel hold, which symbols the library needs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
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


PACKAGE = ("fastenc", "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def copy_tracked(folder: Path, *paths: str) -> set[str]:
    """The tracked files among ``paths``, copied; their names."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *paths],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    names = {name for name in listed if name and (ROOT / name).exists()}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the tracked files, with the smallest libraries that have all their parts."""
    source = tmp_path_factory.mktemp("source")
    copy_tracked(source, *PACKAGE, "csrc/host", "csrc/common", "csrc/cuda/launch_counts.cu")
    out, cuda = tmp_path_factory.mktemp("wheel"), "0" if shutil.which("nvcc") is None else "1"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(out), str(source)],
        check=True, env={**os.environ, "FASTENC_CUDA": cuda, "MAX_JOBS": "2"},
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


def test_an_sdist_made_without_nvcc_holds_the_cuda_sources(tmp_path):
    source = tmp_path / "source"
    needed = copy_tracked(source, *PACKAGE, "MANIFEST.in", "csrc")
    copy_tracked(source, "tests/test_package.py", "docs")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=source, env={**os.environ, "FASTENC_CUDA": "0"}, check=True,
    )  # fmt: skip
    with tarfile.open(next(tmp_path.glob("fastenc-*.tar.gz"))) as archive:
        files = {x.name.partition("/")[2] for x in archive.getmembers() if x.isfile()}
    made = {name for name in files if name.startswith("fastenc.egg-info/")}
    assert files - made - {"PKG-INFO", "setup.cfg"} == needed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_wheel_made_without_a_gpu_holds_the_cuda_library(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.match(r"fastenc/_cuda\..*so$", n))
        library = archive.extract(name, tmp_path)
    # Loaded as fastenc does it, by a torch without CUDA: nothing but torch's symbols may be open.
    script = (
        "import sys, torch; from fastenc.ops import _library\n"
        "library = _library._open_cuda(sys.argv[1])\n"
        "assert library.fastenc_cuda_launch_count(0, None) is None\n"
        "print(*_library.built_for(sys.argv[1])[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, library], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "90a"]


def test_the_oldest_python_reads_every_file():
    """No syntax is younger than the oldest Python of requires-python."""
    found = re.search(r'requires-python = ">=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text())
    oldest = tuple(map(int, found.groups()))
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* OSError: ...", feature_version=oldest)
    names = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for path in (ROOT / name for name in filter(None, names)):
        if path.exists():
            ast.parse(path.read_text(), str(path), feature_version=oldest)


def test_version():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fastenc.__version__}"' in text
