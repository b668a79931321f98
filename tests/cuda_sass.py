"""What a CUDA source compiled to: registers and spills from ptxas, instructions from cuobjdump."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHS = ("80", "90a")


@dataclass
class Sass:
    """One kernel on one architecture. ``code``: (address, instruction) in order."""

    name: str
    registers: int
    stack: int
    spilled: int
    code: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> list[list[str]]:
        """Bodies of the backward branches, longest first.

        Waits that take long lie behind the end of the kernel and branch back into it: no loops.
        """
        spans = []
        for at, text in self.code:
            target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < at:
                spans.append((int(target[1], 16), at))
        spans.sort(key=lambda span: span[0] - span[1])
        bodies = [[text for at, text in self.code if a <= at <= b] for a, b in spans]
        return [body for body in bodies if "EXIT" not in body]


def setup_script():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastenc_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")


def nvcc_of(build) -> str:
    """The nvcc that setup.py takes; skips where there is none."""
    nvcc, line = build.choose_cuda({**os.environ, "FASTENC_CUDA": "", "FASTENC_CUDA_ARCHS": ""})
    if nvcc is None:
        pytest.skip(line)
    return nvcc


def library() -> Path:
    """Built below build/, which git ignores: unchanged sources are not compiled again."""
    build = setup_script()
    nvcc, folder = nvcc_of(build), Path(build.object_folder(list(ARCHS)))
    path = folder / "_cuda.so"
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with alone(folder):
        build.build_cuda(nvcc, list(ARCHS), str(folder), str(path), jobs)
    return path


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip("cuobjdump was not found (CUDA toolkit, triton)")
    return found


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While another process of the tests compiles into ``folder``, wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiled(source: str, arch: str = "sm_90a") -> tuple[dict[str, Sass], str]:
    """Kernels of ``csrc/cuda/<source>`` for ``arch`` by demangled name, and what nvcc said; with
    them, those of the sources that setup.py compiles as one with it.

    Skips where nvcc or cuobjdump is missing. Objects are kept where setup.py keeps them.
    """
    build = setup_script()
    nvcc = nvcc_of(build)
    tool, folder = cuobjdump(), Path(build.object_folder(list(ARCHS)))
    units = build.units([str(path) for path in ROOT.glob("csrc/cuda/*.cu")])
    path = str(ROOT / "csrc" / "cuda" / source)
    unit = next(unit for unit in units.items() if path in unit[1])
    flags = build.nvcc_flags(list(ARCHS))
    with alone(folder):
        built = Path(build.compile_cuda(nvcc, *unit, str(folder), flags))
    log = built.with_suffix(".log").read_text()
    entry = re.compile(
        rf"Compiling entry function '(\w+)' for '{arch}'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = {
        symbol: Sass("", int(registers), int(stack), int(stores) + int(loads))
        for symbol, stack, stores, loads, registers in entry.findall(log)
    }
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = re.sub(r"fastenc::|cuda::|sm90::|void ", "", name).split("(")[0]
    sass = subprocess.run(
        [tool, "-sass", "-arch", arch, str(built)], capture_output=True, text=True, check=True
    ).stdout
    for part in sass.split("Function : ")[1:]:
        kernel = kernels[part.split(None, 1)[0]]
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);", part)
        kernel.code = [(int(at, 16), text.strip()) for at, text in lines]
    return {k.name: k for k in kernels.values()}, log


def check_hopper(kernels: dict[str, Sass], log: str, producer: bool = False) -> None:
    """Tensor cores and TMA in the main loop, everything else in registers; prints resources.

    ``producer``: a warpgroup of its own loads, in a loop of its own.
    """
    for k in sorted(kernels.values(), key=lambda k: k.name):
        products = sum("HGMMA" in text for _, text in k.code)
        print(f"  {k.name:56} {k.registers:4} registers {products:4} HGMMA {len(k.code):6} in all")
    # ptxas says so where it had to put a wait after every product.
    assert "serialized" not in log, re.findall(r".*serialized.*", log)
    for k in kernels.values():
        assert k.code and k.registers, f"{k.name}: not seen by ptxas or the disassembler"
        assert (k.stack, k.spilled) == (0, 0), f"{k.name}: {k.stack} B stack, {k.spilled} spilled"
        local = [text for _, text in k.code if re.search(r"\b(LDL|STL)\b", text)]
        assert local == [], f"{k.name}: local memory {local[:3]}"
        loops = k.loops()
        for opcode in ("HGMMA", "UTMALDG"):
            looked_at = loops if producer else loops[:1]
            inside = [any(opcode in text for text in loop) for loop in looked_at]
            assert any(inside), f"{k.name}: no {opcode} in its main loop"
