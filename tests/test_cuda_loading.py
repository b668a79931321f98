"""Loading the CUDA library without a GPU: what it serves, and why where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_sass
import pytest

pytestmark = pytest.mark.timeout(1800)  # the build, on a machine that does much else

# What a torch with CUDA has and the CPU wheel lacks, and a driver with one GPU.
STUB = r"""
#include <cstdlib>
static int number(const char* name) { return std::atoi(std::getenv(name)); }
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = number("STUB_DRIVER"); return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = number("STUB_CAPABILITY");
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
}
"""

# NVML of the same machine, with the GPUs of STUB_MACHINE, such as "9075".
NVML_STUB = r"""
#include <cstdlib>
#include <cstring>
static const char* gpus() { return std::getenv("STUB_MACHINE"); }
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = std::atoi(std::getenv("STUB_DRIVER"));
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned* count) { *count = std::strlen(gpus()) / 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, const char** handle) {
  *handle = gpus() + 2 * index;
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(const char* handle, int* major, int* minor) {
  *major = handle[0] - '0';
  *minor = handle[1] - '0';
  return 0;
}
}
"""

PROLOGUE = """
import ctypes, glob, sys, types, warnings
import torch
warnings.simplefilter("error")
library, stub, built = sys.argv[1:]
ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)
torch.version.cuda, torch.cuda.device_count = "13.0", lambda: 1
found = glob.glob
glob.glob = lambda p, **k: ([library] if built == "1" else []) if "_cuda" in p else found(p, **k)
import fastenc
from fastenc.ops import _library
OPS = ("geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention",
       "rope_varlen_attention", "span_pool", "span_score", "span_candidates", "token_score",
       "disentangled_attention")
suffixes = lambda op: ("fwd",) if op == "span_candidates" else ("fwd", "bwd")
def serves(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
"""

SERVED = """
for op in OPS:
    assert fastenc.backends()[op]["cuda"] == "available", fastenc.backends()[op]
    for suffix in suffixes(op):
        assert _library.serves_cuda(f"{op}_{suffix}")
        assert serves(f"fastenc::{op}_{suffix}") and serves(f"fastenc_cuda::{op}_{suffix}")
# What the library has no kernel for goes to Triton, or is refused where it was asked for.
like = types.SimpleNamespace(shape=(3, 2, 160), dtype=torch.float32, device=torch.device("cuda"))
from fastenc.ops import _registry
small = _library.gpu_capabilities() == ((12, 0),)  # 99 KiB of shared memory a block
served = {
    "varlen_attention": 96 if small else 128,
    "rope_varlen_attention": 96 if small else 128,
    "disentangled_attention": 0 if small else 128,
}
for op, most in served.items():
    for head_dim in (64, 96, 128, 160):
        like.shape = (3, 2, head_dim)
        expected = f"fastenc::{op}_fwd" if head_dim <= most else f"fastenc_triton::{op}_fwd"
        assert _registry.select(op, like).name() == expected, (head_dim, expected)
like.shape = (3, 2, 64)
_registry._measured.add("varlen_attention")
assert _registry.select("varlen_attention", like).name() == "fastenc_triton::varlen_attention_fwd"
_registry._measured.clear()
with fastenc.use_backend("cuda"):
    like.shape = (3, 2, 160)
    try:
        _registry.select("varlen_attention", like)
    except NotImplementedError as error:
        most = served["varlen_attention"]
        assert f"it serves head_dim up to {most}, got 160" in str(error), error
    else:
        raise AssertionError("head_dim 160 was accepted")
# The dispatcher's own table names the library's registration, not a Python kernel.
table = torch._C._dispatch_dump("fastenc::geglu_fwd")
cuda = next(line for line in table.splitlines() if line.startswith("CUDA"))
assert "python" not in cuda.lower(), table
# A call through the boxed kernel counts, and its refusal arrives as an exception.
x = torch.zeros(2, 8)
cuda_key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
with fastenc.record() as record:
    try:
        torch.ops.fastenc.geglu_fwd.default.redispatch(cuda_key, x, "gelu")
    except RuntimeError as error:
        assert "expected a CUDA tensor" in str(error), error
    else:
        raise AssertionError("a CPU tensor was accepted")
assert record.calls == {"geglu": {"cuda": 1}}, record.calls
# GLiNER's ops take the arguments of their schemas, and refuse before they touch memory.
heads, table, lse = torch.zeros(3, 2, 8), torch.zeros(2, 8, 8), torch.zeros(2, 3)
index = torch.zeros(9).int()
words, labels, cu = torch.zeros(3, 8), torch.zeros(1, 2, 8), torch.tensor([0, 3]).int()
for name, arguments in {
    "span_pool_fwd": (words, words, cu, 2),
    "span_pool_bwd": (torch.zeros(3, 2, 8), words, words, cu, 2),
    "span_score_fwd": (words, words, labels, cu, 2, None, 0.0, None),
    "span_score_bwd": (torch.zeros(3, 2, 2), words, words, labels, cu, 2, 0.0, None),
    "span_candidates_fwd": (words, words, labels, cu, 2, 0.5, None),
    "token_score_fwd": (words, labels, words, labels, words, words, cu, None, 0.0, None),
    "token_score_bwd": (words, words, labels, words, labels, words, words, cu, 0.0, None),
    "disentangled_attention_fwd": (heads, heads, heads, table, None, index, cu, 3, 1.0, 0.0, None),
    "disentangled_attention_bwd": (
        heads, heads, heads, heads, table, None, heads, lse, index, cu, 3, 1.0, 0.0, None
    ),
}.items():
    try:
        getattr(torch.ops.fastenc, name).default.redispatch(cuda_key, *arguments)
    except RuntimeError as error:
        assert "expected a CUDA tensor" in str(error), error
    else:
        raise AssertionError("a CPU tensor was accepted")
"""

NOT_SERVED = """
reason = fastenc.backends()["geglu"]["cuda"]
assert {expected!r} in reason, reason
for op in OPS:
    assert not _library.serves_cuda(f"{{op}}_fwd") and not serves(f"fastenc_cuda::{{op}}_fwd")
    assert serves(f"fastenc::{{op}}_fwd")  # Triton's
assert _library.launch_counts().keys().isdisjoint({{("geglu", "cuda")}})
"""


def stand_in(folder: Path, name: str, source: str) -> Path:
    (folder / f"{name}.cpp").write_text(source)
    built = folder / name
    command = ["g++", "-shared", "-fPIC", str(folder / f"{name}.cpp"), "-o", str(built)]
    subprocess.run(command, check=True)
    return built


@pytest.fixture(scope="module")
def library():
    return cuda_sass.library()


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("driver"), "libcuda.so.1", STUB)


@pytest.fixture(scope="module")
def nvml(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("nvml"), "libnvidia-ml.so.1", NVML_STUB)


def run_with_gpu(
    script: str, library: Path, stub: Path, capability: str, *,
    built: str = "1", driver: str = "13000", nvml: Path | None = None, machine: str = "",
):  # fmt: skip
    """``machine``: the GPUs that NVML names; the driver shows one of ``capability``."""
    paths = [str(stub.parent), str(nvml.parent) if nvml else "", os.environ.get("LD_LIBRARY_PATH")]
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + script, str(library), str(stub), built],
        cwd=cuda_sass.ROOT, capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths)), "STUB_DRIVER": driver,
             "STUB_CAPABILITY": capability, "STUB_MACHINE": machine},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overriding" not in done.stderr, done.stderr


@cuda_sass.needs_nvcc
@pytest.mark.parametrize("capability", ["80", "90", "120"])
def test_the_default_op_reaches_the_library(library, stub, capability):
    run_with_gpu(SERVED, library, stub, capability)


@cuda_sass.needs_nvcc
def test_importing_does_not_initialise_cuda(library, nvml, tmp_path):
    """After cuInit a forked child can no longer use CUDA: where NVML answers, it is not called."""
    source = STUB.replace("int cuInit(unsigned) { return 0; }", "int cuInit(unsigned) { abort(); }")
    fatal = stand_in(tmp_path, "libcuda.so.1", source.replace("{ abort", "{ std::abort"))
    run_with_gpu(SERVED, library, fatal, "80", nvml=nvml, machine="8090")


@cuda_sass.needs_nvcc
def test_a_hidden_gpu_that_is_too_old_does_not_matter(library, stub, nvml):
    script = SERVED + "assert _library.gpu_capabilities() == ((9, 0),)"
    run_with_gpu(script, library, stub, "90", nvml=nvml, machine="7590")
    expected = "is built for sm_80, sm_90a; a GPU here is sm_75"
    run_with_gpu(NOT_SERVED.format(expected=expected), library, stub, "75", nvml=nvml, machine="75")


@cuda_sass.needs_nvcc
def test_a_driver_older_than_the_toolkit_is_the_reason(library, stub, nvml):
    expected = "is built with CUDA 13; the driver here serves 12.8"
    script = NOT_SERVED.format(expected=expected)
    run_with_gpu(script, library, stub, "90", driver="12080")
    run_with_gpu(script, library, stub, "90", driver="12080", nvml=nvml, machine="90")


def test_architectures_served():
    from fastenc.ops._library import arch_served

    def served(archs):
        return {c for c in ("75", "80", "89", "90", "100", "103", "120")
                if arch_served(archs, (int(c[:-1]), int(c[-1])))}  # fmt: skip

    assert served(["80", "90a"]) == {"80", "89", "90", "100", "103", "120"}
    assert served(["90a"]) == {"90"}
    assert served(["100f", "90a"]) == {"90", "100", "103"}
    assert served(["120", "89"]) == {"89", "90", "100", "103", "120"}
    assert served([]) == set()


def test_a_library_fits_every_gpu_and_the_driver():
    from fastenc.ops._gpus import Gpus
    from fastenc.ops._library import _unfit

    hopper, turing = (9, 0), (7, 5)
    for gpus, words in (
        (Gpus((hopper, (8, 6)), (13, 0)), None),
        (Gpus((hopper,), (14, 1)), None),
        (Gpus((hopper,), None), None),
        (Gpus((hopper, turing), (13, 0)), "is built for sm_80, sm_90a; a GPU here is sm_75"),
        (Gpus((turing, hopper), (13, 0)), "is built for sm_80, sm_90a; a GPU here is sm_75"),
        (Gpus((hopper,), (12, 9)), "is built with CUDA 13; the driver here serves 12.9"),
    ):
        found = _unfit(["80", "90a"], 13, gpus)
        assert found is None if words is None else words in found, gpus


def test_the_heads_that_the_smallest_shared_memory_serves(monkeypatch):
    import torch

    from fastenc.ops import _checks, _library
    from fastenc.ops._gpus import Gpus

    for capabilities, most, disentangled in (
        ((), 128, 128), (((9, 0),), 128, 128), (((8, 0), (10, 0)), 128, 128),
        (((9, 0), (8, 6)), 96, 0), (((12, 0),), 96, 0),
    ):  # fmt: skip
        monkeypatch.setattr(_library, "_gpus_served", Gpus(capabilities))
        for head_dim in (64, 96, 97, 128, 129):
            x = torch.empty(1, 1, head_dim)
            assert (_checks.cuda_head_dim(x) is None) == (head_dim <= most), capabilities
            assert (_checks.cuda_disentangled(x) is None) == (head_dim <= disentangled)


def test_the_table_of_measured_ops_is_for_one_kind_of_gpu():
    from fastenc.ops._registry import measured_for_triton

    table = {("geglu", "sm_90"): 1.1, ("rope", "sm_80"): 1.2}
    assert measured_for_triton(table, [(9, 0), (9, 0)]) == {"geglu"}
    assert measured_for_triton(table, [(9, 0), (8, 0)]) == frozenset()
    assert measured_for_triton(table, []) == frozenset()


@cuda_sass.needs_nvcc
def test_a_library_for_hopper_alone_is_not_loaded_elsewhere(library, stub, tmp_path):
    """The same file, its record of targets replaced: only the record is read before loading."""
    data = library.read_bytes()
    assert data.count(b"fastenc-cuda-archs:80;90a\0") == 1
    other = tmp_path / "_cuda.so"
    other.write_bytes(data.replace(b"archs:80;90a\0", b"archs:90a\0\0\0\0"))
    expected = "is built for sm_90a; a GPU here is sm_80"
    run_with_gpu(NOT_SERVED.format(expected=expected), other, stub, "80")


@cuda_sass.needs_nvcc
def test_an_older_gpu_is_left_to_triton(library, stub):
    expected = "is built for sm_80, sm_90a; a GPU here is sm_75"
    run_with_gpu(NOT_SERVED.format(expected=expected), library, stub, "75")


@cuda_sass.needs_nvcc
def test_without_the_library_triton_serves(library, stub):
    run_with_gpu(NOT_SERVED.format(expected="is not built"), library, stub, "90", built="0")
