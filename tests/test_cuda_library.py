"""The CUDA library without a GPU: it compiles, what it compiled to, its symbols, its dispatch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cuda_sass
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(1800)  # the build, on a machine that does much else
ARCHS = ("80", "90a")
# 16-byte loads and stores that each vector kernel has at least. Their scalar siblings
# (a width of 1, the first number in the name, or "loop" in it) serve what is not aligned.
ACCESSES = {
    "geglu_fwd_kernel": (2, 1),
    "geglu_bwd_kernel": (3, 2),
    "rope_kernel": (8, 8),
    "add_layer_norm_fwd_kernel": (8, 8),
    "add_layer_norm_bwd_kernel": (3, 2),
    "add_layer_norm_sum_kernel": (1, 0),
    "segment_pool_mean_kernel": (1, 1),
    "segment_pool_max_kernel": (1, 2),
    "segment_pool_bwd_kernel": (1, 1),
    "span_pool_fwd_kernel": (2, 1),
    "span_pool_bwd_kernel": (6, 2),
    "span_score_fwd_kernel": (3, 0),
    "span_candidates_kernel": (3, 0),
    "span_words_bwd_kernel": (1, 0),
    "span_labels_bwd_kernel": (2, 0),
    "token_score_fwd_kernel": (6, 0),
    "token_hidden_bwd_kernel": (6, 1),
    "token_weight_bwd_kernel": (2, 0),
    "token_labels_sum_kernel": (4, 1),
    "token_words_sum_kernel": (4, 1),
}
# Kernels that multiply, how many of each there are, and the instructions that each has at least:
# FFMA in fp32, else HMMA and LDSM; 16-byte cp.async and stores. Rows of spans are made, not copied.
TILE_KERNELS = {
    "varlen_attention_fwd_kernel": (12, 256, 32, 16, 4, 1),  # dtypes, padded head_dim
    "varlen_attention_dq_kernel": (12, 256, 32, 16, 4, 1),
    "varlen_attention_dkdv_kernel": (12, 256, 32, 16, 4, 1),
    "disentangled_attention_fwd_kernel": (6, 512, 60, 40, 4, 1),  # dtypes, padded head_dim
    "disentangled_attention_dq_kernel": (6, 512, 90, 60, 4, 1),
    "disentangled_attention_dkdv_kernel": (6, 512, 110, 70, 4, 2),
    "span_score_fwd_kernel": (12, 64, 16, 12, 0, 0),  # dtypes, vector widths, labels of a tile
    "span_candidates_kernel": (12, 64, 16, 12, 0, 0),  # dtypes, vector widths, count or write
    "span_words_bwd_kernel": (12, 64, 32, 16, 0, 0),  # dtypes, vector widths, starts or ends
    "span_labels_bwd_kernel": (6, 64, 32, 16, 0, 0),
    "token_score_fwd_kernel": (6, 256, 64, 36, 4, 0),  # dtypes, vector widths
    "token_hidden_bwd_kernel": (6, 256, 64, 36, 4, 0),
    "token_factors_bwd_kernel": (6, 256, 64, 36, 4, 0),
    "token_weight_bwd_kernel": (6, 64, 32, 20, 4, 0),
}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")


@pytest.fixture(scope="module")
def build():
    return cuda_sass.setup_script()


# ---- what was compiled ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(build):
    """Built below build/, which git ignores: unchanged sources are not compiled again."""
    nvcc, line = build.choose_cuda({**os.environ, "FASTENC_CUDA": "", "FASTENC_CUDA_ARCHS": ""})
    if nvcc is None:
        pytest.skip(line)
    folder = Path(build.object_folder(list(ARCHS)))
    path = folder / "_cuda.so"
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with cuda_sass.alone(folder):
        build.build_cuda(nvcc, list(ARCHS), str(folder), str(path), jobs)
    return path


@dataclass
class Kernel:
    name: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    opcodes: Counter = field(default_factory=Counter)

    @property
    def stem(self) -> str:
        return self.name.split("<")[0]

    @property
    def scalar(self) -> bool:
        width = re.search(r"\b\d+\b", self.name.partition("<")[2])
        return "loop" in self.stem or (width is not None and width[0] == "1")


def plain(symbols: list[str]) -> list[str]:
    """Mangled kernel symbols as ``name<arguments>``."""
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = []
    for full in demangled:
        kernel = full.replace("(anonymous namespace)::", "").replace("fastenc::", "")
        kernel = re.sub(r"\(cuda::Activation\)", "", kernel)
        names.append(kernel.removeprefix("void ").removeprefix("cuda::").split("(")[0])
    return names


def ptxas_report(folder: Path) -> dict[str, dict[str, Kernel]]:
    """{architecture: {symbol: Kernel}} from what ``-Xptxas -v`` said."""
    found: dict[str, dict[str, Kernel]] = {f"sm_{a}": {} for a in ARCHS}
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for log in sorted(folder.glob("*.log")):
        for symbol, arch, stack, stores, loads, registers in entry.findall(log.read_text()):
            found[arch][symbol] = Kernel("", int(registers), int(stack), int(stores) + int(loads))
    return found


def count_opcodes(objects: list[Path], arch: str, kernels: dict[str, Kernel]) -> None:
    tool = cuda_sass.cuobjdump()
    for path in objects:
        sass = subprocess.run(
            [tool, "-sass", "-arch", arch, str(path)], capture_output=True, text=True, check=True
        ).stdout
        for part in sass.split("Function : ")[1:]:
            symbol = part.split(None, 1)[0]
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part)
            kernels[symbol].opcodes.update(opcodes)


@pytest.fixture(scope="module")
def kernels(library) -> dict[str, list[Kernel]]:
    report = ptxas_report(library.parent)
    objects = sorted(library.parent.glob("*.o"))
    for arch, found in report.items():
        count_opcodes(objects, arch, found)
        for kernel, name in zip(found.values(), plain(list(found)), strict=True):
            kernel.name = name
    return {arch: list(found.values()) for arch, found in report.items()}


@needs_nvcc
@pytest.mark.parametrize("arch", [f"sm_{a}" for a in ARCHS])
def test_kernels_keep_everything_in_registers(kernels, arch):
    print(f"\n{arch}: registers, 16-byte loads and stores, instructions")
    for k in sorted(kernels[arch], key=lambda k: k.name):
        print(
            f"  {k.name:60} {k.registers:4} {wide(k, 'LDG'):3} {wide(k, 'STG'):3} "
            f"{k.opcodes.total():6}"
        )
    assert {k.stem for k in kernels[arch]} >= {*ACCESSES, *TILE_KERNELS}
    for k in kernels[arch]:
        assert k.registers and k.opcodes, f"{k.name}: not seen by ptxas or the disassembler"
        assert (k.stack, k.spilled) == (0, 0), f"{k.name}: {k.stack} B stack, {k.spilled} spilled"
        local = [op for op in k.opcodes if re.match(r"(LDL|STL)\b", op)]
        assert local == [], f"{k.name}: local memory"


def wide(kernel: Kernel, opcode: str) -> int:
    return sum(n for op, n in kernel.opcodes.items() if re.match(rf"{opcode}\.E\.128\b", op))


@needs_nvcc
@pytest.mark.parametrize("arch", [f"sm_{a}" for a in ARCHS])
@pytest.mark.parametrize("stem", sorted(ACCESSES))
def test_vector_kernels_move_16_bytes(kernels, arch, stem):
    chosen = [k for k in kernels[arch] if k.stem == stem and not k.scalar]
    assert len(chosen) >= 3  # one a dtype at least
    loads, stores = ACCESSES[stem]
    for k in chosen:
        assert wide(k, "LDG") >= loads, f"{k.name}: {k.opcodes}"
        assert wide(k, "STG") >= stores, f"{k.name}: {k.opcodes}"


@needs_nvcc
@pytest.mark.parametrize("arch", [f"sm_{a}" for a in ARCHS])
@pytest.mark.parametrize("stem", TILE_KERNELS)
def test_tile_kernels_use_the_units_they_should(kernels, arch, stem):
    kinds, ffma, hmma, ldsm, copies, stores = TILE_KERNELS[stem]
    chosen = [k for k in kernels[arch] if k.stem == stem]
    assert len(chosen) == kinds
    for k in chosen:
        uses = Counter({op: count(k, op) for op in ("HMMA", "LDSM", "FFMA", "LDGSTS.E.BYPASS.128")})
        if "float" in k.name:
            assert uses["HMMA"] == 0 and uses["FFMA"] >= ffma, f"{k.name}: {uses}"
        else:
            assert uses["HMMA"] >= hmma and uses["LDSM"] >= ldsm, f"{k.name}: {uses}"
        assert k.scalar or uses["LDGSTS.E.BYPASS.128"] >= copies, f"{k.name}: {uses}"
        assert wide(k, "STG") >= stores, f"{k.name}: {k.opcodes}"


def count(kernel: Kernel, opcode: str) -> int:
    return sum(n for op, n in kernel.opcodes.items() if op == opcode or op.startswith(f"{opcode}."))


@needs_nvcc
def test_it_needs_only_the_stable_abi(library):
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [line.split()[-1] for line in lines]
    free = re.compile(
        r"aoti_torch_\w+|torch_\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
        r"|_ITM_\w+|__gmon_start__|__cxa_\w+"
        r"|_ZN[KRO]*St\w+"  # a torch with CUDA exports libstdc++'s, without their versions
    )
    assert [n for n in names if not free.fullmatch(n)] == []
    assert "aoti_torch_get_current_cuda_stream" in names
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "cudart" not in needed and "libcuda" not in needed
    assert set(re.findall(r"\[lib(?:torch|c10)\w*\.so.*?\]", needed)) == {"[libtorch.so]"}


# ---- dispatch ------------------------------------------------------------------------------------

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
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths)), "STUB_DRIVER": driver,
             "STUB_CAPABILITY": capability, "STUB_MACHINE": machine},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overriding" not in done.stderr, done.stderr


@needs_nvcc
@pytest.mark.parametrize("capability", ["80", "90", "120"])
def test_the_default_op_reaches_the_library(library, stub, capability):
    run_with_gpu(SERVED, library, stub, capability)


@needs_nvcc
def test_importing_does_not_initialise_cuda(library, nvml, tmp_path):
    """After cuInit a forked child can no longer use CUDA: where NVML answers, it is not called."""
    source = STUB.replace("int cuInit(unsigned) { return 0; }", "int cuInit(unsigned) { abort(); }")
    fatal = stand_in(tmp_path, "libcuda.so.1", source.replace("{ abort", "{ std::abort"))
    run_with_gpu(SERVED, library, fatal, "80", nvml=nvml, machine="8090")


@needs_nvcc
def test_a_hidden_gpu_that_is_too_old_does_not_matter(library, stub, nvml):
    script = SERVED + "assert _library.gpu_capabilities() == ((9, 0),)"
    run_with_gpu(script, library, stub, "90", nvml=nvml, machine="7590")
    expected = "is built for sm_80, sm_90a; a GPU here is sm_75"
    run_with_gpu(NOT_SERVED.format(expected=expected), library, stub, "75", nvml=nvml, machine="75")


@needs_nvcc
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


def test_the_table_of_measured_ops_is_for_one_kind_of_gpu():
    from fastenc.ops._registry import measured_for_triton

    table = {("geglu", "sm_90"): 1.1, ("rope", "sm_80"): 1.2}
    assert measured_for_triton(table, [(9, 0), (9, 0)]) == {"geglu"}
    assert measured_for_triton(table, [(9, 0), (8, 0)]) == frozenset()
    assert measured_for_triton(table, []) == frozenset()


@needs_nvcc
def test_a_library_for_hopper_alone_is_not_loaded_elsewhere(library, stub, tmp_path):
    """The same file, its record of targets replaced: only the record is read before loading."""
    data = library.read_bytes()
    assert data.count(b"fastenc-cuda-archs:80;90a\0") == 1
    other = tmp_path / "_cuda.so"
    other.write_bytes(data.replace(b"archs:80;90a\0", b"archs:90a\0\0\0\0"))
    expected = "is built for sm_90a; a GPU here is sm_80"
    run_with_gpu(NOT_SERVED.format(expected=expected), other, stub, "80")


@needs_nvcc
def test_an_older_gpu_is_left_to_triton(library, stub):
    expected = "is built for sm_80, sm_90a; a GPU here is sm_75"
    run_with_gpu(NOT_SERVED.format(expected=expected), library, stub, "75")


@needs_nvcc
def test_without_the_library_triton_serves(library, stub):
    run_with_gpu(NOT_SERVED.format(expected="is not built"), library, stub, "90", built="0")
