"""The index arithmetic of the CUDA row kernels, compiled by g++ and held against brute force."""

from __future__ import annotations

import ctypes
import itertools
import random

import cuda_model
import numpy as np
import pytest

INT32_MAX = 2**31 - 1

SHIM = r"""
#include "csrc/common/row_tiles.h"
using namespace fastenc;
extern "C" {

void divide(uint32_t d, const uint32_t* n, int64_t count, uint32_t* q, uint32_t* r) {
  const Divider by(d);
  for (int64_t i = 0; i < count; ++i) {
    q[i] = by.quotient(n[i]);
    r[i] = by.remainder(n[i], q[i]);
  }
}

int vectors(int64_t size, int width, uint64_t bits) { return vectors_fit(size, width, bits); }

// {blocks, groups, rows_per_group, threads}
void flat_shape(int64_t rows, int64_t columns, int64_t* out) {
  const FlatTiles t = make_flat_tiles(rows, columns);
  const int64_t shape[] = {t.blocks, t.groups, t.rows_per_group, FlatTiles::kThreads};
  for (int i = 0; i < 4; ++i) out[i] = shape[i];
}

void flat_one(int64_t rows, int64_t columns, uint32_t group, uint32_t block, uint32_t thread,
              int64_t* out) {
  const Place p = make_flat_tiles(rows, columns).locate(group, block, thread);
  out[0] = p.row;
  out[1] = p.column;
  out[2] = p.inside;
}

int flat_fits(int64_t rows, int64_t columns) { return flat_tiles_fit(rows, columns); }

// hits (rows, columns); returns how many threads own something outside.
int64_t flat_hits(int64_t rows, int64_t columns, int32_t* hits) {
  const FlatTiles t = make_flat_tiles(rows, columns);
  int64_t outside = 0;
  for (uint32_t g = 0; g < t.groups; ++g)
    for (uint32_t b = 0; b < t.blocks; ++b)
      for (uint32_t i = 0; i < FlatTiles::kThreads; ++i) {
        const Place p = t.locate(g, b, i);
        if (!p.inside) continue;
        if (p.row < 0 || p.row >= rows || p.column >= columns) ++outside;
        else ++hits[p.row * columns + p.column];
      }
  return outside;
}

int rope_fits(int64_t tokens, int64_t n, int64_t heads, int64_t v) {
  return rope_tiles_fit(tokens, n, heads, v);
}

// hits (tokens, n, heads, vectors)
int64_t rope_hits(int64_t tokens, int64_t n, int64_t heads, int64_t vectors, int32_t* hits) {
  const RopeTiles t = make_rope_tiles(tokens, n, heads, vectors);
  int64_t outside = 0;
  for (uint32_t g = 0; g < t.flat.groups; ++g)
    for (uint32_t b = 0; b < t.flat.blocks; ++b)
      for (uint32_t i = 0; i < FlatTiles::kThreads; ++i) {
        const Place p = t.flat.locate(g, b, i);
        if (!p.inside) continue;
        const RopeItem item = t.item(p.column);
        for (int j = 0; j < RopeTiles::kHeads; ++j) {
          const uint32_t head = t.head(item.first_head, j);
          if (head >= t.all_heads) continue;
          const uint32_t k = t.by_heads.quotient(head), h = t.by_heads.remainder(head, k);
          if (p.row >= tokens || k >= n || h >= heads || item.vector >= vectors) ++outside;
          else ++hits[((p.row * n + k) * heads + h) * vectors + item.vector];
        }
      }
  return outside;
}

static void put(const RowPlan& p, int64_t* out) {
  const int64_t fields[] = {p.in_registers, p.elements, p.threads_per_row, p.rows_per_block,
                            p.blocks};
  for (int i = 0; i < 5; ++i) out[i] = fields[i];
}
void plan(int64_t rows, int64_t hidden, int vectors, int64_t* out) {
  put(plan_layer_norm(rows, hidden, vectors), out);
}
void plan_bwd(int64_t rows, int64_t hidden, int vectors, int sms, int64_t* out) {
  put(plan_layer_norm_bwd(rows, hidden, vectors, sms), out);
}
int64_t column(int thread, int k, int threads, int width) {
  return row_column(thread, k, threads, width);
}
int64_t pitch(int64_t hidden) { return PartialSums::pitch(hidden); }
void partial_shape(int64_t* out) {
  const int64_t shape[] = {PartialSums::kWidth, PartialSums::kLanes, PartialSums::kSlices};
  for (int i = 0; i < 3; ++i) out[i] = shape[i];
}

int64_t sequence(const int32_t* edges, int64_t n, int64_t token) {
  return find_sequence(edges, n, token);
}

// As segment_pool does it: slices side by side, then in order.
int32_t peak(const float* x, int32_t count, int slices) {
  Peak best;
  for (int s = 0; s < slices; ++s) {
    Peak mine;
    for (int32_t i = s; i < count; i += slices) mine = higher(mine, {x[i], i});
    best = higher(best, mine);
  }
  return best.token;
}
}
"""


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    library = cuda_model.compile_shim(
        SHIM, tmp_path_factory.mktemp("row_tiles"), "-Wno-sign-compare"
    )
    i64, u64, u32, i32 = ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
    pointer = ctypes.c_void_p
    for name, result, *arguments in (
        ("divide", None, u32, pointer, i64, pointer, pointer),
        ("vectors", i32, i64, i32, u64),
        ("flat_shape", None, i64, i64, pointer),
        ("flat_one", None, i64, i64, u32, u32, u32, pointer),
        ("flat_fits", i32, i64, i64),
        ("flat_hits", i64, i64, i64, pointer),
        ("rope_fits", i32, i64, i64, i64, i64),
        ("rope_hits", i64, i64, i64, i64, i64, pointer),
        ("plan", None, i64, i64, i32, pointer),
        ("plan_bwd", None, i64, i64, i32, i32, pointer),
        ("column", i64, i32, i32, i32, i32),
        ("pitch", i64, i64),
        ("partial_shape", None, pointer),
        ("sequence", i64, pointer, i64, i64),
        ("peak", ctypes.c_int32, pointer, ctypes.c_int32, i32),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def filled(function, *args, size: int) -> list[int]:
    out = np.full(size, -1, dtype=np.int64)
    function(*args, out.ctypes.data)
    return out.tolist()


def test_divider(lib):
    rng = np.random.default_rng(0)
    edges = [1, 2, 3, 5, 7, 96, 144, 641, 2**16 - 1, 2**16, 2**30 - 1, 2**30, 2**30 + 1, INT32_MAX]
    divisors = edges + rng.integers(1, INT32_MAX, 300).tolist() + list(range(1, 300))
    for d in divisors:
        near = [m * d + e for m in (0, 1, 2, INT32_MAX // d) for e in (-1, 0, 1)]
        near += [INT32_MAX, INT32_MAX - 1]
        n = np.array([v for v in near if 0 <= v <= INT32_MAX], dtype=np.uint32)
        n = np.concatenate([n, rng.integers(0, 2**31, 200).astype(np.uint32)])
        q, r = np.empty_like(n), np.empty_like(n)
        lib.divide(d, n.ctypes.data, n.size, q.ctypes.data, r.ctypes.data)
        np.testing.assert_array_equal(q, n // np.uint32(d), err_msg=f"divisor {d}")
        np.testing.assert_array_equal(r, n % np.uint32(d), err_msg=f"divisor {d}")


@pytest.mark.parametrize("width,itemsize", [(8, 2), (4, 4), (8, 4)])
def test_vectors_are_chosen_only_where_every_access_is_aligned(lib, width, itemsize):
    for inner, offset, stride in itertools.product(range(1, 40), range(0, 10), range(0, 40, 4)):
        base, pitch = offset * itemsize, stride * itemsize
        fits = lib.vectors(inner, width, base | pitch)
        starts = [base + r * pitch + i * itemsize for r in range(4) for i in range(0, inner, width)]
        legal = inner % width == 0 and all(s % 16 == 0 for s in starts)
        assert not fits or legal, (inner, offset, stride)
        if offset == 0 and stride % width == 0 and inner % width == 0:
            assert fits


@pytest.mark.parametrize("rows", [1, 2, 3, 255, 256, 257, 1000])
@pytest.mark.parametrize("columns", [1, 2, 3, 96, 144, 255, 256, 257, 777])
def test_flat_tiles_own_every_item_once(lib, rows, columns):
    hits = np.zeros((rows, columns), dtype=np.int32)
    assert lib.flat_hits(rows, columns, hits.ctypes.data) == 0
    assert (hits == 1).all()


@pytest.mark.parametrize(
    "rows,columns",
    [(2**33, 144), (2**31 + 5, 1), (65_535 * 7, 10**8), (3, INT32_MAX - 256), (10**10, 1152)],
)
def test_flat_tiles_past_32_bits(lib, rows, columns):
    assert lib.flat_fits(rows, columns)
    blocks, groups, per_group, threads = filled(lib.flat_shape, rows, columns, size=4)
    assert blocks * threads <= INT32_MAX + 1 and groups <= 65_535
    assert per_group * columns <= blocks * threads and (groups - 1) * per_group < rows
    assert groups * per_group >= rows
    rng = random.Random(0)
    samples = [(0, 0), (rows - 1, columns - 1), (min(per_group, rows - 1), 0)]
    samples += [(rng.randrange(rows), rng.randrange(columns)) for _ in range(200)]
    for row, column in samples:
        group, item = row // per_group, row % per_group * columns + column
        place = filled(lib.flat_one, rows, columns, group, item // threads, item % threads, size=3)
        assert place == [row, column, 1]
    past = per_group * columns  # the first group's threads leave the next group's rows alone
    for item in range(past, blocks * threads):
        place = filled(lib.flat_one, rows, columns, 0, item // threads, item % threads, size=3)
        assert not place[2]
    last = filled(lib.flat_one, rows, columns, groups - 1, blocks - 1, threads - 1, size=3)
    assert not last[2] or last[0] < rows


def test_flat_tiles_refuse_what_a_grid_cannot_hold(lib):
    assert not lib.flat_fits(65_536, INT32_MAX - 256)
    assert not lib.flat_fits(1, INT32_MAX)
    assert lib.flat_fits(0, 1) and lib.flat_fits(65_535, INT32_MAX - 256)


@pytest.mark.parametrize("tokens", [1, 2, 65, 200])
@pytest.mark.parametrize("n,heads", [(1, 1), (1, 3), (2, 12), (3, 5), (1, 16)])
@pytest.mark.parametrize("vectors", [1, 3, 4, 16])
def test_rope_tiles_own_every_vector_once(lib, tokens, n, heads, vectors):
    hits = np.zeros((tokens, n, heads, vectors), dtype=np.int32)
    assert lib.rope_fits(tokens, n, heads, vectors)
    assert lib.rope_hits(tokens, n, heads, vectors, hits.ctypes.data) == 0
    assert (hits == 1).all()


def test_rope_tiles_refuse_overflow(lib):
    assert lib.rope_fits(2**31, 3, 16, 4)
    for sizes in ((1, 2**20, 2**20, 1), (1, 1, 2**20, 2**20), (1, 1, INT32_MAX, 1)):
        assert not lib.rope_fits(*sizes)


HIDDEN = (8, 32, 384, 768, 1024, 1032, 4096, 4104, 8192, 8200, 16_384, 16_392)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 1000])
def test_layer_norm_plans_cover_each_row(lib, hidden, width, rows):
    names = ("in_registers", "elements", "threads", "rows_per_block", "blocks")
    forward = dict(zip(names, filled(lib.plan, rows, hidden, 1, size=5), strict=True))
    backward = dict(zip(names, filled(lib.plan_bwd, rows, hidden, 1, 132, size=5), strict=True))
    assert forward["in_registers"] == (hidden <= 16_384)
    assert backward["in_registers"] == (hidden <= 8192)
    for plan in (forward, backward):
        threads = plan["threads"]
        assert threads * plan["rows_per_block"] <= 512 and threads % 32 == 0
        if plan["in_registers"]:
            owned = [
                lib.column(t, k, threads, width)
                for t in range(threads)
                for k in range(plan["elements"] // width)
            ]
            inside = sorted(c for c in owned if c < hidden)
            assert inside == list(range(0, hidden, width))
    per_block = forward["rows_per_block"]
    assert per_block == 1 or forward["threads"] == 32
    assert (forward["blocks"] - 1) * per_block < rows <= forward["blocks"] * per_block
    blocks = backward["blocks"]
    walked = sorted(r for b in range(blocks) for r in range(b, rows, blocks))
    assert walked == list(range(rows)) and 1 <= blocks <= min(rows, 8 * 132)
    assert filled(lib.plan, rows, hidden, 0, size=5)[0] == 0
    assert filled(lib.plan_bwd, rows, hidden, 0, 132, size=5)[0] == 0


@pytest.mark.parametrize("hidden", [1, 3, 4, 31, 32, 33, 768, 1001])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1056])
def test_partial_sums_take_each_partial_once(lib, hidden, count):
    width, lanes, slices = filled(lib.partial_shape, size=3)
    pitch = lib.pitch(hidden)
    assert pitch >= hidden and pitch % width == 0 and pitch - hidden < width
    hits = np.zeros((count, pitch), dtype=int)
    for block, lane, s in itertools.product(
        range(-(-pitch // (width * lanes))), range(lanes), range(slices)
    ):
        column = block * width * lanes + lane * width
        if column < pitch:
            for p in range(s, count, slices):
                hits[p, column : column + width] += 1
    assert (hits == 1).all()


def test_no_rows_need_no_partials(lib):
    assert filled(lib.plan_bwd, 0, 768, 1, 132, size=5)[4] == 0


def test_find_sequence(lib):
    rng = np.random.default_rng(1)
    for num_seqs in (1, 2, 3, 17, 500):
        for _ in range(20):
            lengths = rng.integers(0, 5, num_seqs)
            lengths[rng.integers(num_seqs)] += 1
            edges = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
            owner = np.repeat(np.arange(num_seqs), lengths)
            found = [lib.sequence(edges.ctypes.data, num_seqs, t) for t in range(edges[-1])]
            assert found == owner.tolist()


def first_peak(values) -> int:
    best = -1
    for i, value in enumerate(values):
        better = best >= 0 and (
            value > values[best] or (np.isnan(value) and not np.isnan(values[best]))
        )
        if best < 0 or better:
            best = i
    return best


def test_maximum_is_the_first_whatever_the_grouping(lib):
    rng = np.random.default_rng(2)
    pool = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan, np.nan], dtype=np.float32)
    for count in (0, 1, 2, 31, 32, 33, 70):
        for trial in range(200):
            values = rng.choice(pool[: len(pool) - trial % 4], count)
            for slices in (1, 2, 32):
                assert lib.peak(values.ctypes.data, count, slices) == first_peak(values)
