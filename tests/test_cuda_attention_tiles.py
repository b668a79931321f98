"""The index arithmetic of the CUDA attention and span kernels, against brute force."""

from __future__ import annotations

import ctypes
import itertools

import cuda_model
import numpy as np
import pytest

SHIM = r"""
#include <initializer_list>

#include "csrc/common/hopper_tiles.h"
using namespace fastenc;
extern "C" {

int64_t slots(int64_t tokens, int64_t num_seqs, int rows) {
  return attention_slots(tokens, num_seqs, rows);
}
// {seq, start, length, first}
void locate(const int32_t* edges, int32_t num_seqs, int64_t slot, int rows, int64_t scale,
            int32_t* out) {
  const AttentionTile t = locate_tile(edges, num_seqs, slot, rows, scale);
  const int32_t fields[] = {t.seq, t.start, t.length, t.first};
  for (int i = 0; i < 4; ++i) out[i] = fields[i];
}
void seen(int32_t first, int32_t last, int32_t length, int32_t back, int32_t ahead, int32_t* out) {
  const Range r = seen_from(first, last, length, back, ahead);
  out[0] = r.begin;
  out[1] = r.end;
}
int full(int32_t query, int32_t queries, int32_t key, int32_t keys, int32_t length, int32_t left,
         int32_t right) {
  return fully_seen(query, queries, key, keys, length, left, right);
}
int sees_key(int32_t query, int32_t key, int32_t length, int32_t left, int32_t right) {
  return sees(query, key, length, left, right);
}
int32_t distance(int32_t query, int32_t key, int32_t radius) {
  return clamped_distance(query, key, radius);
}
int32_t unlimited() { return kUnlimited; }

// First rows of the blocks around a tile, in their order; returns how many.
int32_t halo(int32_t first, int32_t length, int32_t back, int32_t ahead, int32_t* rows) {
  const Halo around = halo_of(first, length, back, ahead);
  for (int i = 0; i < around.count; ++i) rows[i] = halo_row(around, first, i);
  return around.count;
}
int meet(int32_t first, int32_t other, int32_t length, int32_t back, int32_t ahead) {
  return blocks_meet(first, other, length, back, ahead);
}

// Bytes of shared memory at its largest, of every shape that is launched.
int64_t largest_bytes() {
  int64_t most = 0;
  const auto of = [&](auto shape) {
    for (const int64_t bytes : {shape.forward_bytes(), shape.dq_bytes() + shape.bias_bytes(512),
                                shape.dkdv_bytes()})
      most = bytes > most ? bytes : most;
  };
  of(AttentionShape<2, 64>{}), of(AttentionShape<2, 128>{});
  of(AttentionShape<4, 64>{}), of(AttentionShape<4, 128>{});
  return most;
}
}
"""


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    library = cuda_model.compile_shim(SHIM, tmp_path_factory.mktemp("attention_tiles"))
    i64, i32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    for name, result, *arguments in (
        ("slots", i64, i64, i64, i32),
        ("locate", None, pointer, i32, i64, i32, i64, pointer),
        ("seen", None, *[i32] * 5, pointer),
        ("full", i32, *[i32] * 7),
        ("sees_key", i32, *[i32] * 5),
        ("distance", i32, *[i32] * 3),
        ("unlimited", i32),
        ("halo", i32, *[i32] * 4, pointer),
        ("meet", i32, *[i32] * 5),
        ("largest_bytes", i64),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def tiles(lib, lengths, rows: int, scale: int) -> list[tuple[int, int, int, int]]:
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    out = np.empty(4, dtype=np.int32)
    found = []
    for slot in range(lib.slots(int(edges[-1]) * scale, len(lengths), rows)):
        lib.locate(edges.ctypes.data, len(lengths), slot, rows, scale, out.ctypes.data)
        seq, start, length, first = out.tolist()
        assert (start, length) == (edges[seq], lengths[seq] * scale)
        found.append((seq, start, length, first))
    return found


@pytest.mark.parametrize("scale", [1, 3, 12, 100])
@pytest.mark.parametrize("rows", [1, 7, 64, 128])
def test_every_row_of_every_sequence_has_one_tile(lib, rows, scale):
    rng = np.random.default_rng(rows * scale)
    cases = [[1], [0, 0, 5, 0], [rows, rows], [rows - 1, rows + 1, 1]]
    cases += [rng.integers(0, 200, n).tolist() for n in (1, 2, 9, 40)]
    for lengths in cases:
        owned = [np.zeros(n * scale, dtype=int) for n in lengths]
        for seq, _, length, first in tiles(lib, lengths, rows, scale):
            assert first >= 0 and first % rows == 0
            owned[seq][first : min(first + rows, length)] += 1
        assert all((hits == 1).all() for hits in owned), lengths


def test_tiles_past_32_bits(lib):
    """Slots and rows of a sequence fit 32 bits; where it begins among the rows need not."""
    edges = np.array([0, 2**30, 2**30 + 1000, 2**31 - 1], dtype=np.int32)
    rows, scale, out = 64, 12, np.empty(4, dtype=np.int32)
    slot = (2**30 * scale) // rows + 1  # the second sequence's first
    for step, expected in ((0, 0), (1, 64), (1000 * scale // rows, 11_968)):
        lib.locate(edges.ctypes.data, 3, slot + step, rows, scale, out.ctypes.data)
        assert out.tolist() == [1, 2**30, 12_000, expected]


WINDOWS = [(0, 0), (1, 0), (0, 2), (3, 5), (40, 40)]


@pytest.mark.parametrize("window", [*WINDOWS, None], ids=str)
def test_the_keys_seen_are_those_of_the_rows(lib, window):
    left, right = window or (lib.unlimited(), lib.unlimited())
    out = np.empty(2, dtype=np.int32)
    for length in (1, 5, 33):
        sees = np.array(
            [[lib.sees_key(q, k, length, left, right) for k in range(length + 3)]
             for q in range(length)]
        )  # fmt: skip
        wanted = [
            [k < length and q - left <= k <= q + right for k in range(length + 3)]
            for q in range(length)
        ]
        assert (sees == np.array(wanted)).all()
        for first, rows in itertools.product(range(0, length, 3), (1, 4, 16)):
            last = min(first + rows, length) - 1
            lib.seen(first, last, length, left, right, out.ctypes.data)
            begin, end = out.tolist()
            keys = np.flatnonzero(sees[first : last + 1].any(0))
            assert begin % 4 == 0 and keys[0] - 4 < begin <= keys[0] and end == keys[-1] + 1


@pytest.mark.parametrize("window", [*WINDOWS, None], ids=str)
def test_fully_seen_says_that_no_mask_is_needed(lib, window):
    left, right = window or (lib.unlimited(), lib.unlimited())
    length = 21
    for query, key in itertools.product(range(0, length + 4, 3), range(0, length + 4)):
        for queries, keys in ((1, 1), (4, 4), (8, 2)):
            pairs = itertools.product(range(query, query + queries), range(key, key + keys))
            wanted = all(q < length and k < length and q - left <= k <= q + right for q, k in pairs)
            assert lib.full(query, queries, key, keys, length, left, right) == wanted


def test_clamped_distance(lib):
    for query, key, radius in itertools.product(range(12), range(12), (0, 1, 5, 20)):
        assert lib.distance(query, key, radius) == np.clip(key - query, -radius, radius)


@pytest.mark.parametrize("back", [0, 1, 63, 64, 65, 128, 200, 2**30])
@pytest.mark.parametrize("ahead", [0, 64, 127, 128, 129, 2**30])
def test_the_blocks_around_a_tile_are_those_that_it_sees(lib, back, ahead):
    rows = np.empty(32, dtype=np.int32)
    for length in (1, 64, 128, 129, 192, 193, 257, 400, 1000):
        seen = np.array([[max(q - back, 0), min(q + ahead + 1, length)] for q in range(length)])

        def of_block(first, other, seen=seen, length=length):
            part = seen[first : first + 64]
            return bool(((part[:, 0] < min(other + 64, length)) & (part[:, 1] > other)).any())

        for first in range(0, length, 128):
            halo = rows[: lib.halo(first, length, back, ahead, rows.ctypes.data)].tolist()
            own = [first, first + 64]
            assert halo == [
                other
                for other in range(0, length, 64)
                if other not in own and any(of_block(row, other) for row in own)
            ]
            for row, other in itertools.product(own, own + halo):
                assert lib.meet(row, other, length, back, ahead) == of_block(row, other)


def test_tiles_fit_the_shared_memory_of_ampere(lib):
    assert 0 < lib.largest_bytes() <= 163 * 1024  # sm_80, opt-in, for a block
