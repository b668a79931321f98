"""The record of readings: what names a reading, when a kernel is compiled again, how it is kept."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compiling
import launches
import pytest
import record
import torch
import triton

ROOT = Path(__file__).parents[2]
CALLS = (
    functools.partial(launches.call_span_pool, 512, torch.bfloat16),
    functools.partial(launches.call_geglu, 1152, torch.bfloat16),
    functools.partial(launches.call_attention, 64, torch.bfloat16, launches.LOCAL),
)


def digests() -> dict[str, str]:
    found = {}

    def launch(kernel, grid, *args, **options):
        def known(key):
            found[compiling.name_of(kernel)] = compiling.digest_of("sm_90", kernel, key)
            return True

        compiling.build(kernel, grid, args, options, known)

    with compiling.target("sm_90", launch):
        for call in CALLS:
            call()
    return found


def digests_of(package: Path, seed: int) -> dict[str, str]:
    """Those of another copy of the package, in a process of its own."""
    code = "import json, fastenc, test_record; "
    code += "print(json.dumps([fastenc.__file__, test_record.digests()]))"
    path = os.pathsep.join([str(package.parent), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    file, found = json.loads(done.stdout)
    assert Path(file).parent == package
    return found


def test_digest_follows_from_sources_alone(tmp_path):
    """Not from folders, line numbers, comments or the order of hashes; from all that is called."""
    package = tmp_path / "fastenc"
    shutil.copytree(ROOT / "fastenc", package)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels")
    for path in package.glob("triton_kernels/*.py"):
        path.write_text(path.read_text().replace("\n@triton.jit", "\n# lower\n\n\n@triton.jit"))
    here = digests()
    assert len(here) == len(set(here.values())) == 6
    assert digests_of(package, 1) == digests_of(package, 2) == here

    def changed_by(name: str, old: str, new: str) -> set[str]:
        path = package / "triton_kernels" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        after = digests_of(package, 1)
        path.write_text(text)
        return {kernel for kernel in here if after[kernel] != here[kernel]}

    attention = {k for k in here if "attention" in k}
    assert changed_by("_common.py", "return x.to(dtype)", "return (x * 1).to(dtype)") == set(here)
    assert changed_by("_common.py", "constexpr(1.4426", "constexpr(1.5426") == attention
    assert changed_by("_spans.py", "def pair(", "def pair(unused, ") == set()


@pytest.fixture
def compile_span_pool(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    monkeypatch.setattr(compiling, "record_of", functools.cache(record.Record))
    return lambda: compiling.compile_calls("sm_80", [CALLS[0]], on_record=True)


def test_kernels_on_record_are_not_compiled_again(monkeypatch, compile_span_pool):
    def refuse(*_, **__):
        raise RuntimeError("compiles")

    first = compile_span_pool()
    monkeypatch.setattr(triton.compiler, "compile", refuse)
    assert compile_span_pool() == first and all(k.registers for k in first)
    compiling.record_of.cache_clear()
    assert compile_span_pool() == first
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="compiles"):
        patch.setenv("FASTENC_GATES_AFRESH", "1")
        compile_span_pool()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="compiles"):
        patch.setattr(record, "sources", lambda kernel: "other sources")
        compile_span_pool()
    with pytest.raises(RuntimeError, match="compiles"):
        compiling.compile_calls("sm_80", [CALLS[0]])


def test_files_are_sorted_and_stale_readings_dropped(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    first, second = record.Record("sm_90"), record.Record("sm_90")
    first.add({"b1": ("geglu.k", [1, 2])})
    second.add({"a1": ("geglu.k", [3, 4])})
    first.add({"c1": ("attention.k", [5, 6])})
    (path,) = tmp_path.iterdir()
    lines = ["{", '"attention.k": {', '"c1": [5,6]', "},", '"geglu.k": {']
    lines += ['"a1": [3,4],', '"b1": [1,2]', "}", "}", ""]
    assert path.read_text() == "\n".join(lines)
    second.keep(["b1", "absent"])
    assert record.Record("sm_90").readings == second.readings == {"b1": [1, 2]}
