"""The CUDA library without a GPU: it compiles, what it compiled to, its symbols."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cuda_sass
import pytest

pytestmark = pytest.mark.timeout(1800)  # the build, on a machine that does much else
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


@pytest.fixture(scope="module")
def library():
    return cuda_sass.library()


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
    found: dict[str, dict[str, Kernel]] = {f"sm_{a}": {} for a in cuda_sass.ARCHS}
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


@cuda_sass.needs_nvcc
@pytest.mark.parametrize("arch", [f"sm_{a}" for a in cuda_sass.ARCHS])
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


@cuda_sass.needs_nvcc
@pytest.mark.parametrize("arch", [f"sm_{a}" for a in cuda_sass.ARCHS])
@pytest.mark.parametrize("stem", sorted(ACCESSES))
def test_vector_kernels_move_16_bytes(kernels, arch, stem):
    chosen = [k for k in kernels[arch] if k.stem == stem and not k.scalar]
    assert len(chosen) >= 3  # one a dtype at least
    loads, stores = ACCESSES[stem]
    for k in chosen:
        assert wide(k, "LDG") >= loads, f"{k.name}: {k.opcodes}"
        assert wide(k, "STG") >= stores, f"{k.name}: {k.opcodes}"


@cuda_sass.needs_nvcc
@pytest.mark.parametrize("arch", [f"sm_{a}" for a in cuda_sass.ARCHS])
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


@cuda_sass.needs_nvcc
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
