"""The gates and the interpreter tests under the oldest and the newest Triton; slow."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NESTED = "FASTENC_GATES_NESTED"
# Triton 3.6's interpreter calls int() on one-element arrays, which NumPy 2.4 refuses.
VERSIONS = {"3.6.0": ["numpy<2.4"], "3.9.0": []}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NESTED in os.environ, reason="this is the other environment"),
    pytest.mark.timeout(6000),
]


@pytest.fixture(scope="module", params=VERSIONS)
def python(request, tmp_path_factory) -> str:
    """An interpreter whose Triton is another version; everything else comes from this one."""
    folder = tmp_path_factory.mktemp(f"triton-{request.param}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    wanted = [f"triton=={request.param}", *VERSIONS[request.param]]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *wanted], check=True)
    path = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([python, "-c", path], check=True, capture_output=True, text=True).stdout
    shared = sysconfig.get_paths()["purelib"]
    Path(own.strip(), "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    version = "import triton; print(triton.__version__)"
    found = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == request.param
    return python


def run(python: str, folder: str, **environment: str) -> None:
    environment = {**os.environ, NESTED: "1", **environment}
    command = [python, "-m", "pytest", folder, "-q", "-x", "--timeout=3000"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_gates(python):
    run(python, "tests/gates")


def test_interpreter(python):
    run(python, "tests/interpreter", TRITON_INTERPRET="1")
