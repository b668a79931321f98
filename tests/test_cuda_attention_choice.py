"""Which attention kernel serves a call: csrc/cuda/attention_choice.h, compiled by g++."""

from __future__ import annotations

import ctypes
import re

import cuda_model
import pytest

GENERAL, LOCAL, GLOBAL, STREAM = range(4)

SHIM = r"""
#include "csrc/cuda/attention_choice.h"
using namespace fastenc;
static AttentionCase made(const int64_t* x, double scale) {
  return {int(x[0]), x[1] != 0, int(x[2]), x[3], x[4], x[5], x[6], scale,
          x[7] != 0, x[8] != 0, x[9] != 0, x[10] != 0, x[11] != 0};
}
extern "C" {
int choose(const int64_t* x, double scale) { return int(choose_attention(made(x, scale))); }
int choose_bwd(const int64_t* x) { return int(choose_attention_bwd(made(x, 1.0))); }
int holds(const char* archs) { return holds_sm90a(archs); }
int reach(const int64_t* x) { return local_reach(made(x, 1.0)); }
}
"""
FIELDS = {
    "capability": 90, "sm90a": 1, "item_bytes": 2, "head_dim": 64, "left": 64, "right": 64,
    "max_seqlen": 4096, "dropout": 0, "bias": 0, "rotary": 1, "rotary_same_type": 1, "vectors": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    library = cuda_model.compile_shim(SHIM, tmp_path_factory.mktemp("choice"))
    library.choose.argtypes = [ctypes.c_void_p, ctypes.c_double]
    library.reach.argtypes = library.choose_bwd.argtypes = [ctypes.c_void_p]
    return library


def case(**changed):
    return (ctypes.c_int64 * len(FIELDS))(*{**FIELDS, **changed}.values())


def test_the_local_kernel_serves_hopper(lib):
    for head_dim in (32, 64, 128):
        for rotary in (0, 1):
            assert lib.choose(case(head_dim=head_dim, rotary=rotary), 0.125) == LOCAL
    assert lib.choose(case(rotary=0, rotary_same_type=0), 0.125) == LOCAL


@pytest.mark.parametrize(
    "changed",
    [
        {"sm90a": 0}, {"capability": 80}, {"capability": 89}, {"capability": 100},
        {"capability": 120},
        {"item_bytes": 4}, {"head_dim": 96}, {"head_dim": 8}, {"dropout": 1}, {"bias": 1},
        {"rotary_same_type": 0}, {"vectors": 0}, {"left": 129}, {"right": -1},
        {"head_dim": 128, "left": 65},
    ],
)  # fmt: skip
def test_all_else_is_general(lib, changed):
    assert lib.choose(case(**changed), 0.125) == GENERAL


def test_code_for_hopper(lib):
    assert lib.holds(b"80;90a") and lib.holds(b"90a")
    assert not lib.holds(b"80;90") and not lib.holds(b"unknown targets")


def test_every_field_of_a_case_is_set():
    """A field that the host code forgets is false: no Hopper kernel would ever be chosen."""
    sources = cuda_model.ROOT / "csrc/cuda"
    text = (sources / "attention_choice.h").read_text()
    body = re.sub(r"//.*", "", re.search(r"struct AttentionCase {(.*?)\n};", text, re.S)[1])
    fields = [
        name.strip()
        for line in body.split(";")
        for name in line.split(maxsplit=1)[1:]
        for name in name.split(",")
    ]
    assert set(fields) == {*FIELDS, "scale"}
    made = re.findall(r"\.(\w+) = ", (sources / "attention_sm90.cuh").read_text())
    assert made == fields


def test_a_scale_that_is_not_positive_is_general(lib):
    assert lib.choose(case(), 0.0) == lib.choose(case(), -1.0) == GENERAL


def test_the_global_kernel_serves_unlimited_windows(lib):
    for unlimited in ({"left": -1, "right": -1}, {"left": 4095, "right": -1}):
        for head_dim in (32, 64, 128):
            assert lib.choose(case(head_dim=head_dim, **unlimited), 0.1) == GLOBAL
            assert lib.choose(case(head_dim=head_dim, capability=120, **unlimited), 0.1) == GENERAL
            assert lib.choose_bwd(case(head_dim=head_dim, **unlimited)) == GLOBAL
    assert lib.choose(case(left=4094, right=-1), 0.1) == GENERAL


def test_reach_is_the_narrowest_that_holds_the_window(lib):
    for left in range(0, 140):
        reach = lib.reach(case(left=left, right=3))
        assert reach == (64 if left <= 64 else 128 if left <= 128 else 0)
    # A window past every sequence is as wide as the longest.
    assert lib.reach(case(left=-1, right=500, max_seqlen=65)) == 64
    assert lib.reach(case(left=-1, right=-1, max_seqlen=129)) == 128
    assert lib.reach(case(left=-1, right=-1, max_seqlen=130)) == 0
    assert lib.reach(case(left=-1, right=-1, max_seqlen=0)) == 64


def test_the_backward_by_tiles_where_they_fit_into_shared_memory(lib):
    assert lib.choose_bwd(case()) == lib.choose_bwd(case(head_dim=32, left=128)) == LOCAL
    for changed in ({"head_dim": 128}, {"capability": 80}, {"dropout": 1}):
        assert lib.choose_bwd(case(**changed)) == GENERAL
    short = case(head_dim=128, left=-1, right=-1, max_seqlen=60)
    assert lib.choose(short, 0.1) == LOCAL and lib.choose_bwd(short) == GLOBAL


def test_the_backward_streams_where_they_do_not(lib):
    for window in ({"left": 65}, {"right": 128}, {"left": -1, "right": 90, "max_seqlen": 129}):
        assert lib.choose_bwd(case(**window)) == STREAM
        assert lib.choose(case(**window), 0.1) == LOCAL
    for changed in ({"left": 129}, {"right": -1}, {"capability": 100}, {"bias": 1}):
        assert lib.choose_bwd(case(**{"left": 100, **changed})) == GENERAL
    assert lib.choose_bwd(case(left=-1, right=-1, max_seqlen=130)) == GLOBAL
