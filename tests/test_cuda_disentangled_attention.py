"""What the CUDA kernels of disentangled attention compiled to."""

from __future__ import annotations

import re

import cuda_sass
import pytest

SOURCES = ("disentangled_attention.cu", "disentangled_attention_bwd.cu")
# Products of a step, in mma.m16n8k16 a warp at head_dim 64: content, position terms, values, dp,
# the two of ds, the gradient of a table (its loop over rows is not unrolled).
PRODUCTS = {
    "disentangled_attention_fwd_kernel": 32 + 40 + 40 + 32,
    "disentangled_attention_dq_kernel": 32 + 40 + 40 + 32 + 32 + 40 + 8,
    "disentangled_attention_dkdv_kernel": 32 + 40 + 40 + 32 + 32 + 32 + 40 + 8,
}


@pytest.fixture(scope="module", params=[f"sm_{arch}" for arch in cuda_sass.ARCHS])
def kernels(request):
    found = {}
    for source in SOURCES:
        found |= cuda_sass.compiled(source, request.param)[0]
    return found


def count(kernel: cuda_sass.Sass, opcode: str) -> int:
    return sum(re.search(rf"\b{opcode}\b", text) is not None for _, text in kernel.code)


def test_every_configuration_is_there_and_spills_nothing(kernels):
    stems = [name.split("<")[0] for name in kernels]
    for stem in (*PRODUCTS, "disentangled_table_kernel"):
        assert stems.count(stem) == 6  # dtypes, padded head_dim
    for k in sorted(kernels.values(), key=lambda k: k.name):
        print(f"  {k.name:60} {k.registers:4} registers {len(k.code):6} instructions")
        assert k.code and k.registers, f"{k.name}: not seen by ptxas or the disassembler"
        assert (k.stack, k.spilled) == (0, 0), f"{k.name}: {k.stack} B stack, {k.spilled} spilled"
        assert count(k, "LDL") == count(k, "STL") == 0, f"{k.name}: local memory"


@pytest.mark.parametrize("stem", PRODUCTS)
def test_tiles_are_copied_16_bytes_at_a_time(kernels, stem):
    """Rows, columns and both bands in, gradients out; fp32 bands: one memory, filled twice."""
    for k in (k for k in kernels.values() if k.name.startswith(stem)):
        tiles = 5 if "fwd" in stem else 6  # q, k, v (and dout), a band of each table
        assert count(k, r"LDGSTS\.E\.BYPASS\.128") >= tiles, k.name
        assert count(k, r"STG\.E\.128") >= (2 if "dkdv" in stem else 1), k.name


@pytest.mark.parametrize("stem", PRODUCTS)
def test_products_run_on_the_tensor_cores(kernels, stem):
    for k in (k for k in kernels.values() if k.name.startswith(stem)):
        products = count(k, r"HMMA\.16816\.F32(\.BF16)?")
        if "float" in k.name:
            assert products == 0 and count(k, "FFMA") >= 512, k.name
        elif ", 64>" in k.name or ", (int)64>" in k.name:
            assert products >= PRODUCTS[stem], f"{k.name}: {products}"
        else:
            assert products > 0, k.name


def test_no_kernel_adds_by_atomics(kernels):
    for k in kernels.values():
        assert not any(re.search(r"\b(RED|ATOM|ATOMG|ATOMS)\b", text) for _, text in k.code), k.name
